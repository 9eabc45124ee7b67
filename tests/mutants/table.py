"""Guards of the broker that are broken on purpose, each with the tests that have to see it.

A guard is a line that keeps a promise: take it out, and what it guards against comes true.
"""

from typing import Final

from tests.mutants.mutant import Mutant

CAPS: Final = (
    Mutant(
        "a message of any size",
        "broker/transport/lane.py",
        '            return f"a message of more than {self._limits.max_message_bytes} bytes"\n',
        "            pass\n",
        (
            "tests/transport/test_lane.py::test_over_the_limit_nothing_is_kept_and_the_close_behind_is_seen",
        ),
    ),
    Mutant(
        "any number of fragments",
        "broker/transport/lane.py",
        "        if fragments > self._limits.max_fragments:\n",
        "        if fragments > 2**40:\n",
        ("tests/transport/test_lane.py::test_ten_fragments_pass_and_eleven_do_not",),
    ),
    Mutant(
        "any number of control frames",
        "broker/transport/lane.py",
        "            elif not self._control_allowed():\n",
        "            elif not self._control_allowed() and False:\n",
        ("tests/transport/test_lane.py::test_control_frames_have_a_burst_and_then_a_rate",),
    ),
    Mutant(
        "an inbox without a bound in bytes",
        "broker/transport/lane.py",
        "            self._waiting >= self._limits.inbox_bytes or self._holding.is_over\n",
        "            self._holding.is_over\n",
        ("tests/transport/test_lane.py::test_a_busy_session_leaves_large_messages_unread_too",),
    ),
    Mutant(
        "a connection that is full is read on",
        "broker/transport/lane.py",
        "            self._waiting >= self._limits.inbox_bytes or self._holding.is_over\n",
        "            self._waiting >= self._limits.inbox_bytes\n",
        (
            "tests/transport/test_lane.py::test_nothing_more_is_read_while_a_connection_holds_more_than_it_may",
        ),
    ),
    Mutant(
        "a request head of any length",
        "broker/transport/head.py",
        "    left = limit\n",
        "    left = 1000 * limit\n",
        (
            "tests/transport/test_head.py::test_a_head_over_the_limit_is_refused_and_nothing_past_it_is_read",
        ),
    ),
    Mutant(
        "any number of looks at a node from others",
        "broker/session/views.py",
        "        if self._at_work >= AT_ONCE:\n",
        "        if self._at_work >= 1000 * AT_ONCE:\n",
        ("tests/nodes/test_views.py::test_a_node_that_is_asked_too_much_says_so_and_goes_on",),
    ),
    Mutant(
        "a page of rows that strangers have filled does not fit between nodes",
        "broker/admin/listings.py",
        "        if size > PAGE_BYTES and number:\n",
        "        if size > 1000 * PAGE_BYTES and number:\n",
        (
            "tests/nodes/test_gathered.py::test_a_page_has_as_many_rows_as_fit_and_the_next_has_the_others",
        ),
    ),
    Mutant(
        "a look at a node has any number of bytes",
        "broker/session/views.py",
        "                if len(shown) > MOST_BYTES:\n",
        "                if len(shown) > 1000 * MOST_BYTES:\n",
        ("tests/nodes/test_views.py::test_a_node_that_is_asked_too_much_says_so_and_goes_on",),
    ),
    Mutant(
        "any number of connections",
        "broker/session/admission.py",
        """>= capacity.connections
        if is_full""",
        """>= 1000 + capacity.connections
        if is_full""",
        (
            "tests/session/test_admission.py::test_a_connection_too_many_is_told_and_all_else_is_served",
        ),
    ),
    Mutant(
        "any number of guests",
        "broker/session/admission.py",
        "        return guests + streams <= capacity.guests and self._files + streams <= capacity.files\n",
        "        return self._files + streams <= capacity.files\n",
        ("tests/session/test_admission.py::test_a_newcomer_pushes_out_the_oldest_silent_one",),
    ),
    Mutant(
        "no reserve of files",
        "broker/session/admission.py",
        "        files = file_limit - own\n",
        "        files = file_limit\n",
        (
            "tests/session/test_admission.py::test_the_broker_keeps_files_of_its_own_whatever_strangers_do",
        ),
    ),
    Mutant(
        "any number of the refused linger",
        "broker/session/admission.py",
        "        if len(lingering) > LINGERERS:\n",
        "        if len(lingering) > 10 * LINGERERS:\n",
        ("tests/session/test_admission.py::test_only_so_many_of_the_refused_are_read_on",),
    ),
    Mutant(
        "any number of connections of one user",
        "broker/session/connect.py",
        "    if len([fd for fd in fds if fd != client.peer.fd]) >= limit:\n",
        "    if len([fd for fd in fds if fd != client.peer.fd]) >= 10 * limit:\n",
        ("tests/access/test_topic_rules.py::test_one_user_has_so_many_connections",),
    ),
    Mutant(
        "any number of subscriptions",
        "broker/routing/subscriptions.py",
        "    if len(peer.subscriptions) >= limit:\n",
        "    if len(peer.subscriptions) >= 10 * limit:\n",
        ("tests/session/test_commands.py::test_a_connection_has_a_number_of_subscriptions",),
    ),
    Mutant(
        "subscriptions of any size",
        "broker/routing/subscriptions.py",
        "    if peer.subscription_bytes + size > limit:\n",
        "    if peer.subscription_bytes + size > 100 * limit:\n",
        (
            "tests/routing/test_subscriptions.py::test_subscriptions_are_bounded_in_bytes_and_filters_in_nodes",
        ),
    ),
    Mutant(
        "filters with any number of nodes",
        "broker/routing/subscriptions.py",
        "    if peer.filter_nodes + wanted.nodes > limit:\n",
        "    if peer.filter_nodes + wanted.nodes > 100 * limit:\n",
        (
            "tests/routing/test_subscriptions.py::test_subscriptions_are_bounded_in_bytes_and_filters_in_nodes",
        ),
    ),
    Mutant(
        "any number of open requests",
        "broker/routing/requests.py",
        ">= MAX_ASKED:\n",
        ">= 10 * MAX_ASKED:\n",
        ("tests/routing/test_requests.py::test_a_client_has_a_hundred_requests_open_at_most",),
    ),
    Mutant(
        "an outbox of any number of messages",
        "broker/transport/outbox.py",
        """            or self.messages > self.max_messages
            # Control""",
        "            # Control",
        ("tests/transport/test_outbox.py::test_over_its_bound_an_outbox_is_slow_and_not_before",),
    ),
    Mutant(
        "an outbox of any number of bytes",
        "broker/transport/outbox.py",
        """            self.bytes > self.max_bytes
            or self.messages""",
        """            self.bytes > 1000 * self.max_bytes
            or self.messages""",
        ("tests/transport/test_outbox.py::test_over_its_bound_an_outbox_is_slow_and_not_before",),
    ),
    Mutant(
        "control frames in any number in an outbox",
        "broker/transport/outbox.py",
        "            or len(self.mail) - self._gone > self.max_messages + _SPARE_RUNS\n",
        "",
        ("tests/transport/test_outbox.py::test_control_frames_are_bounded_in_number_too",),
    ),
    Mutant(
        "a history of any size in a reply",
        "broker/routing/reading.py",
        "    return first_bytes(publications, config.history_reply_bytes), top\n",
        "    return publications, top\n",
        (
            "tests/session/test_commands.py::test_history_ends_where_a_reply_is_full_and_goes_on_from_there",
        ),
    ),
    Mutant(
        "any number of publications in a reply",
        "broker/routing/reading.py",
        "    return most if limit < 0 else min(limit, most)\n",
        "    return most if limit < 0 else limit\n",
        ("tests/routing/test_reading.py::test_a_page_of_history_has_history_max_limit_at_most",),
    ),
    Mutant(
        "a recovery of any size",
        "broker/routing/subscriptions.py",
        "            if size > (most if room is None else room) and (",
        "            if size > 1000 * (most if room is None else room) and (",
        ("tests/session/test_commands.py::test_a_recovery_of_more_than_a_reply_may_hold_is_none",),
    ),
    Mutant(
        "a presence of any number",
        "broker/routing/reading.py",
        "    if hub.count(topic) > config.presence_max_clients:\n",
        "    if hub.count(topic) > 100 * config.presence_max_clients:\n",
        (
            "tests/session/test_commands.py::test_a_presence_that_is_too_long_is_refused_and_can_be_counted",
        ),
    ),
    Mutant(
        "a presence of any size",
        "broker/routing/reading.py",
        "    if size > config.history_reply_bytes:\n",
        "    if size > 100 * config.history_reply_bytes:\n",
        (
            "tests/routing/test_reading.py::test_a_presence_shows_history_reply_bytes_of_info_at_most",
        ),
    ),
    Mutant(
        "any number of commands in a message",
        "broker/protocols/centrifuge_json.py",
        "            return _Apart(objects(payload, MAX_COMMANDS))\n",
        "            return _Apart(objects(payload, 10 * MAX_COMMANDS))\n",
        ("tests/protocols/test_centrifuge_json.py::test_a_message_has_so_many_commands_at_most",),
    ),
    Mutant(
        "any number of commands in a message in protobuf",
        "broker/protocols/centrifuge_protobuf.py",
        "            if count > MAX_COMMANDS:\n",
        "            if count > 10 * MAX_COMMANDS:\n",
        (
            "tests/protocols/test_centrifuge_protobuf.py::test_a_message_has_so_many_commands_at_most",
        ),
    ),
    Mutant(
        "any number of results by key",
        "broker/core/idempotency.py",
        "        while len(self._order) > self.max_kept or self._shares.bytes > self.max_bytes:\n",
        "        while self._shares.bytes > self.max_bytes:\n",
        ("tests/core/test_idempotency.py::test_beyond_the_number_the_oldest_is_forgotten",),
    ),
    Mutant(
        "any number of events that wait",
        "broker/core/event_queue.py",
        "        fits = len(self._waiting) < self._capacity\n",
        "        fits = len(self._waiting) < 100 * self._capacity\n",
        (
            "tests/core/test_event_queue.py::test_a_full_queue_drops_the_oldest_and_says_so_but_never_the_start",
        ),
    ),
    Mutant(
        "any number of names in the log",
        "broker/logs/limiter.py",
        "            if second is None and len(self._seconds) >= MAX_NAMES:\n",
        "            if second is None and len(self._seconds) >= 100 * MAX_NAMES:\n",
        (
            "tests/logs/test_limiter.py::test_names_that_an_app_makes_of_a_peers_text_cost_bounded_memory",
        ),
    ),
    Mutant(
        "any number of questions at once",
        "broker/session/questions.py",
        "        while len(self.turns) >= at_once or any(\n",
        "        while len(self.turns) >= 100 * at_once or any(\n",
        ("tests/session/test_questions.py::test_as_many_are_asked_at_once_as_the_settings_say",),
    ),
    Mutant(
        "any number of traces",
        "broker/session/tracing.py",
        "        if len(self._traces) >= TRACES_MOST:\n",
        "        if len(self._traces) >= 10 * TRACES_MOST:\n",
        ("tests/session/test_tracing.py::test_there_are_so_many_traces_at_once",),
    ),
    Mutant(
        "all places for one party",
        "broker/webhooks/places.py",
        "        return self._taken < self.total and self._held[party] < self.share\n",
        "        return self._taken < self.total\n",
        (
            "tests/webhooks/test_places.py::test_one_party_holds_its_share_at_most_and_others_have_the_rest",
        ),
    ),
    Mutant(
        "a body of any size",
        "broker/http/server.py",
        "        elif self._body_left < 0 or length > self._body_bytes:\n",
        "        elif self._body_left < 0:\n",
        ("tests/http/test_server.py::test_a_body_over_the_limit_is_refused_by_its_length",),
    ),
    Mutant(
        "a body of any size in chunks",
        "broker/http/server.py",
        "        elif self._body_left < 0 or length > self._body_bytes:\n",
        "        elif length > self._body_bytes:\n",
        (
            "tests/http/test_server.py::test_a_chunked_body_over_the_limit_is_refused_once_it_is_there",
        ),
    ),
)
"""What has a bound."""

DEADLINES: Final = (
    Mutant(
        "a look at a node goes on though nobody waits for it",
        "broker/session/views.py",
        "            with trio.move_on_after(CALL_SECONDS):  # then nobody waits for it any more\n",
        "            with trio.move_on_after(1000):\n",
        ("tests/nodes/test_views.py::test_a_node_that_is_asked_too_much_says_so_and_goes_on",),
    ),
    Mutant(
        "a message that is never whole",
        "broker/transport/lane.py",
        "            self._deadline = trio.current_time() + self._limits.message_seconds\n",
        "            self._deadline = trio.current_time() + 1000 * self._limits.message_seconds\n",
        ("tests/transport/test_lane.py::test_a_message_that_is_not_whole_in_time_is_a_violation",),
    ),
    Mutant(
        "a request that never comes",
        "broker/session/accept.py",
        "        with trio.move_on_after(config.open_seconds) as opening:\n",
        "        with trio.move_on_after(1000 * config.open_seconds) as opening:\n",
        (
            "tests/session/test_accept.py::test_a_request_that_does_not_come_in_open_seconds_is_answered_408",
        ),
    ),
    Mutant(
        "a stale peer stays",
        "broker/session/heartbeat.py",
        """        if not self._orders.may_be_plain:
            return True
""",
        """        if not self._orders.may_be_plain:
            return False
""",
        ("tests/session/test_heartbeat.py::test_a_peer_that_has_to_connect_and_does_not_is_stale",),
    ),
    Mutant(
        "a stale peer without its token stays",
        "broker/session/heartbeat.py",
        "        return tokens_required and not (peer.user or self._orders.app_vouches)\n",
        "        return False\n",
        ("tests/session/test_heartbeat.py::test_a_peer_that_has_to_connect_and_does_not_is_stale",),
    ),
    Mutant(
        "a ping that is never answered",
        "broker/session/heartbeat.py",
        "        elif now - pinged_at < config.pong_seconds:\n",
        "        elif now - pinged_at < 1000 * config.pong_seconds:\n",
        ("tests/session/test_heartbeat.py::test_a_client_that_does_not_answer_is_sent_away",),
    ),
    Mutant(
        "goodbye without a deadline for what is queued",
        "broker/session/ending.py",
        "    with trio.move_on_after(seconds) as answering:\n",
        "    with trio.CancelScope() as answering:\n",
        (
            "tests/session/test_ending.py::test_a_goodbye_that_nobody_takes_is_over_close_seconds_later",
        ),
    ),
    Mutant(
        "goodbye without a deadline for the answer",
        "broker/session/ending.py",
        "        answering.deadline = trio.current_time() + seconds\n",
        "        answering.deadline = inf\n",
        ("tests/test_hostile.py::test_s2_who_ignores_our_close_is_cut",),
    ),
    Mutant(
        "a peer that takes nothing stays, on a socket",
        "broker/transport/outbox.py",
        "                with trio.move_on_after(self._stall_seconds) as progress:\n",
        "                with trio.move_on_after(1000 * self._stall_seconds) as progress:\n",
        (
            "tests/transport/test_outbox.py::test_a_peer_that_takes_nothing_for_the_stall_time_is_given_up",
        ),
    ),
    Mutant(
        "a peer that takes nothing stays, on a stream",
        "broker/transport/outbox.py",
        "        deadline = inf if self._guarded else trio.current_time() + self._stall_seconds\n",
        "        deadline = inf\n",
        (
            "tests/transport/test_outbox.py::test_a_peer_that_takes_nothing_for_the_stall_time_is_given_up",
        ),
    ),
    Mutant(
        "a stop that waits for ever",
        "broker/app.py",
        "                    sessions.cancel_scope.deadline = due\n",
        "                    sessions.cancel_scope.deadline = due + 1000\n",
        ("tests/test_lifetimes.py::test_a_stop_has_its_bound_however_the_hooks_hang",),
    ),
    Mutant(
        "a hook that hangs is never cancelled",
        "broker/session/connection.py",
        "            self._serving.deadline = self._serve_until\n",
        "            self._serving.deadline = self._serve_until + 1000\n",
        (
            "tests/test_lifetimes.py::test_a_hook_that_hangs_is_cancelled_close_seconds_after_the_end",
        ),
    ),
    Mutant(
        "questions that outlive their client",
        "broker/session/questions.py",
        "                turn.scope.deadline = due\n",
        "                turn.scope.deadline = due + 1000\n",
        (
            "tests/session/test_questions.py::test_hooks_have_close_seconds_also_where_the_peer_stays",
        ),
    ),
    Mutant(
        "last words without an end",
        "broker/session/services.py",
        "            seconds = min(seconds, LAST_WORDS_SECONDS)\n",
        "            pass\n",
        ("tests/session/test_services.py::test_last_words_that_begin_in_a_cut_have_a_second",),
    ),
    Mutant(
        "a stop does not shorten last words",
        "broker/session/services.py",
        "            scope.deadline = min(scope.deadline, self._cut_at)\n",
        "            pass\n",
        (
            "tests/session/test_services.py::test_a_stop_shortens_the_last_words_that_are_being_said",
        ),
    ),
    Mutant(
        "a request that is never answered",
        "broker/routing/requests.py",
        "        while (first := self._due.first()) is not None and first[0] <= now:\n",
        "        while (first := self._due.first()) is not None and first[0] <= now - 1000:\n",
        ("tests/routing/test_requests.py::test_a_request_fails_when_its_time_is_over",),
    ),
    Mutant(
        "a key that holds for ever",
        "broker/core/idempotency.py",
        "            if kept.due > now:\n",
        "            if kept.due > now - 10_000:\n",
        ("tests/core/test_idempotency.py::test_a_result_is_kept_until_its_time_is_over",),
    ),
    Mutant(
        "a publication that is kept for ever",
        "broker/core/history.py",
        " + history.ttl <= now:\n",
        " + 10 * history.ttl <= now:\n",
        ("tests/core/test_history.py::test_when_all_has_expired_only_who_missed_nothing_recovers",),
    ),
)
"""What has an end."""

CONTAINMENT: Final = (
    Mutant(
        "`meet` lets a plain exception out",
        "broker/session/accept.py",
        'services.log.exception("connection_failed", peer=address)\n',
        "raise\n",
        ("tests/session/test_accept.py::test_a_mistake_of_ours_ends_one_connection_and_is_logged",),
    ),
    Mutant(
        "a hook for messages that fails is called a mistake of ours",
        "broker/session/connection.py",
        """                except Exception as error:  # noqa: BLE001 - it ends this connection, and no other
                    end_by(self._services, self.fd, error, hook)
                # Questions""",
        """                except LookupError as error:
                    end_by(self._services, self.fd, error, hook)
                # Questions""",
        ("tests/test_lifetimes.py::test_a_hook_that_raises_ends_its_own_connection_only",),
    ),
    Mutant(
        "a close hook that fails is called a mistake of ours",
        "broker/session/ending.py",
        """        except Exception:
            services.log.exception("hook_failed", hook="close", fd=connection.fd)
""",
        """        except LookupError:
            services.log.exception("hook_failed", hook="close", fd=connection.fd)
""",
        ("tests/test_lifetimes.py::test_a_hook_that_raises_ends_its_own_connection_only",),
    ),
    Mutant(
        "an odd exception of a hook is let through",
        "broker/hooks.py",
        "            raise raised from error  # noqa: ASYNC104 - all that was asked for goes on\n",
        "            raise\n",
        ("tests/test_hooks.py::test_an_odd_exception_is_contained_like_any_other",),
    ),
    Mutant(
        "an authorizer that fails ends the connection",
        "broker/session/dispatch.py",
        """            if isinstance(error, Disconnect) or (
                method == "send" and not isinstance(error, Refused)
            ):
""",
        "            if not isinstance(error, Refused):\n",
        ("tests/session/test_commands.py::test_each_hook_may_refuse_or_fail_and_the_client_stays",),
    ),
    Mutant(
        "an accept that fails ends the listener",
        "broker/transport/listeners.py",
        """                except OSError as error:
                    reason = f"{errno""",
        """                except LookupError as error:
                    reason = f"{errno""",
        (
            "tests/session/test_admission.py::test_an_accept_that_finds_no_file_ends_nothing_and_is_tried_again",
        ),
    ),
    Mutant(
        "the close hook is cut off with the broker",
        "broker/session/services.py",
        "        with trio.CancelScope(shield=True, deadline=deadline) as scope:\n",
        "        with trio.CancelScope(shield=False, deadline=deadline) as scope:\n",
        (
            "tests/session/test_ending.py::test_the_close_hook_runs_also_where_the_whole_broker_is_cut",
        ),
    ),
    Mutant(
        "after a broken frame more is parsed",
        "broker/transport/lane.py",
        """            self.close(*error)
            self._begin_to_ignore()
""",
        "            self.close(*error)\n",
        (
            "tests/transport/test_lane.py::test_behind_a_broken_frame_nothing_counts_and_the_next_word_is_the_end",
        ),
    ),
)
"""What fails, and takes nothing else along."""

ORDER: Final = (
    Mutant(
        "close overtakes the open run",
        "broker/session/connection.py",
        "        router.send(self.peer, () if codec is None else (codec.disconnect(code, reason),))\n",
        """        if codec is not None:
            router.send(self.peer, (codec.disconnect(code, reason),))
""",
        (
            "tests/session/test_ending.py::test_a_close_stands_behind_what_was_published_in_the_same_step",
        ),
    ),
    Mutant(
        "a run goes by listeners who have left",
        "broker/core/hub.py",
        "        self._subscriptions -= 1\n        self.changes += 1\n",
        "        self._subscriptions -= 1\n",
        (
            "tests/routing/test_router.py::test_a_run_goes_by_what_the_last_one_found_until_that_changes",
        ),
    ),
    Mutant(
        "a run goes by settings that are no longer in force",
        "broker/routing/router.py",
        "            and self._steady_since == (self.hub.changes, self.settings.version)\n",
        "            and self._steady_since[0] == self.hub.changes\n",
        (
            "tests/routing/test_router.py::test_a_run_goes_by_what_the_last_one_found_until_that_changes",
        ),
    ),
    Mutant(
        "a reply overtakes what was published before",
        "broker/routing/router.py",
        """        \"\"\"The same for a run that the caller has made, to look for it in the outbox later.\"\"\"
        self._end_run()
""",
        '        """The same for a run that the caller has made, to look for it in the outbox later."""\n',
        ("tests/session/test_dispatch.py::test_commands_behind_a_connect_wait_for_it",),
    ),
    Mutant(
        "a new subscriber gets what was published before",
        "broker/routing/router.py",
        """        \"\"\"Add a subscription; those who watch its topic learn of it with the next `announce`.\"\"\"
        self._end_run()
""",
        '        """Add a subscription; those who watch its topic learn of it with the next `announce`."""\n',
        ("tests/routing/test_router.py::test_a_run_ends_at_anything_that_comes_between",),
    ),
    Mutant(
        "one who leaves misses what was published before",
        "broker/routing/router.py",
        """        \"\"\"Remove a subscription and tell those who watch; None if there was none.\"\"\"
        self._end_run()
""",
        '        """Remove a subscription and tell those who watch; None if there was none."""\n',
        ("tests/routing/test_router.py::test_a_run_ends_at_anything_that_comes_between",),
    ),
    Mutant(
        "questions about one topic overtake each other",
        "broker/session/questions.py",
        "            topic is not None and turn.topic == topic for turn in self.turns\n",
        "            False for turn in self.turns\n",
        (
            "tests/session/test_questions.py::test_of_two_about_one_topic_the_second_is_asked_when_the_first_is_carried_out",
        ),
    ),
    Mutant(
        "a question is carried out before one that came earlier",
        "broker/session/questions.py",
        "            while self.turns and not self.turns[0].is_open:\n",
        "            while self.turns and (len(self.turns) > 1 or not self.turns[0].is_open):\n",
        (
            "tests/session/test_questions.py::test_replies_come_in_order_whichever_answer_was_there_first",
        ),
    ),
    Mutant(
        "a recovery answers the top",
        "broker/routing/subscriptions.py",
        "                position = Position(request.offset, position.epoch)\n",
        "                pass\n",
        (
            "tests/routing/test_subscriptions.py::test_topics_of_the_connect_reply_are_recovered_through_connect",
        ),
    ),
    Mutant(
        "an outbox is flushed out of order",
        "broker/transport/outbox.py",
        """        self.mail.append(run)
        self.bytes += run.size
""",
        """        self.mail.insert(max(self._begun, len(self.mail) - 1), run)
        self.bytes += run.size
""",
        ("tests/transport/test_outbox.py::test_frames_arrive_whole_and_in_order",),
    ),
    Mutant(
        "a partial write is sent again from its start",
        "broker/transport/outbox.py",
        """        if self._sent:
            parts[0] = memoryview(parts[0])[self._sent :]
""",
        "",
        ("tests/transport/test_outbox.py::test_frames_arrive_whole_and_in_order",),
    ),
    Mutant(
        "an answer to a publish comes before it is kept",
        "broker/engines/sqlite.py",
        """                    await self._commit(batch)
                    await self._give_back(batch, sink)
""",
        """                    await self._give_back(batch, sink)
                    await self._commit(batch)
""",
        (
            "tests/engines/test_sqlite.py::test_what_comes_while_a_commit_is_under_way_is_in_the_next_one",
        ),
    ),
)
"""The order of things."""

RIGHTS: Final = (
    Mutant(
        "the rules are not asked again after the hook, to subscribe",
        "broker/session/commands.py",
        """        grant = services.rights.grant(peer, name, token)
        if reply.info is not None:
""",
        """        from broker.core.session import Decider, Grant

        grant = Grant(name, Decider.HOOK, peer.user)
        if reply.info is not None:
""",
        ("tests/test_rights_at_the_act.py::test_reading_is_closed_to_those_who_may_not_subscribe",),
    ),
    Mutant(
        "the rules are not asked again after the hook, to publish by a call",
        "broker/session/rpc.py",
        "            client.services.rights.check_publish(client.peer, params.target)\n",
        "            pass\n",
        ("tests/test_rights_at_the_act.py::test_a_right_that_goes_while_a_hook_waits_is_gone",),
    ),
    Mutant(
        "the rules are not asked again after the hook, to read a history",
        "broker/session/commands.py",
        '        services.rights.check_read(client.peer, request.channel, "history")\n',
        "",
        (
            "tests/test_rights_at_the_act.py::test_a_topic_is_read_by_subscribers_alone_where_a_hook_decides",
        ),
    ),
    Mutant(
        "the rules are not asked again after the hook, to read presence",
        "broker/session/commands.py",
        """        client.services.rights.check_read(client.peer, topic, "presence")
        return topic
""",
        "        return topic\n",
        (
            "tests/test_rights_at_the_act.py::test_a_topic_is_read_by_subscribers_alone_where_a_hook_decides",
        ),
    ),
    Mutant(
        "a token of another is as good",
        "broker/session/commands.py",
        "        if wanted != given:\n",
        '        if wanted != given and what == "topic":\n',
        ("tests/session/test_commands.py::test_a_token_that_is_given_must_be_good",),
    ),
    Mutant(
        "an operator has topics",
        "broker/session/orders.py",
        """        if not (peer.is_established and peer.is_apps):
            return False
""",
        """        if not peer.is_established:
            return False
""",
        ("tests/session/test_desk.py::test_nobody_writes_to_an_operator",),
    ),
    Mutant(
        "topics that wait for anybody",
        "broker/session/orders.py",
        "for name, sub in self._topics.items() if admits_user(name, user)}",
        "for name, sub in self._topics.items()}",
        ("tests/test_rights_at_the_act.py::test_topics_that_wait_are_held_to_the_user_too",),
    ),
    Mutant(
        "a key that has changed",
        "broker/http/calls.py",
        "        if not self.may_go_on():\n",
        "        if False:\n",
        (
            "tests/http/test_api_server.py::test_a_key_that_is_changed_in_the_middle_of_a_request_is_no_key",
        ),
    ),
    Mutant(
        "an end that a second may pass",
        "broker/session/dispatch.py",
        "            end_expired(connection, trio.current_time())",
        "            pass",
        ("tests/test_rights_at_the_act.py::test_a_token_that_is_over_while_a_hook_waits_is_over",),
    ),
    Mutant(
        "headers that are weighed as nothing",
        "broker/access/tokens.py",
        "    if algorithm != _algorithm_of(",
        "    if False and algorithm != _algorithm_of(",
        (
            "tests/access/test_tokens.py::test_no_header_has_a_signature_verified_that_was_not_weighed",
        ),
    ),
    Mutant(
        "anybody may subscribe to a connection's own name",
        "broker/access/rights.py",
        """        if name.startswith(DIRECT):
            raise Refused(DENIED, "only an fd itself gets what is sent to it")
""",
        "",
        ("tests/access/test_rights.py::test_some_names_nobody_can_listen_to",),
    ),
    Mutant(
        "anybody may subscribe to a user's own name",
        "broker/access/rights.py",
        """        if name.startswith(PERSONAL):
            raise Refused(DENIED, "only a user gets what is sent to it")
""",
        "",
        ("tests/access/test_rights.py::test_some_names_nobody_can_listen_to",),
    ),
    Mutant(
        "a pattern brings what its subscriber may not have",
        "broker/access/rights.py",
        "            return among and allows(rules.may_subscribe, user)\n",
        "            return among\n",
        ("tests/access/test_rights.py::test_through_a_pattern_nobody_gets_more_than_by_name",),
    ),
    Mutant(
        "a pattern brings private topics",
        "broker/access/rights.py",
        "            if private or (hook_decides and by in (Decider.RULES, Decider.HOOK)):\n",
        "            if hook_decides and by in (Decider.RULES, Decider.HOOK):\n",
        ("tests/access/test_rights.py::test_through_a_pattern_nobody_gets_more_than_by_name",),
    ),
    Mutant(
        "who has become another keeps what was his",
        "broker/access/rights.py",
        """            return rules is not None and allows(rules.may_subscribe, session.user)
        return True
""",
        """            return rules is not None
        return True
""",
        (
            "tests/access/test_rights.py::test_a_subscription_outlives_a_change_of_its_user_where_he_may_have_it",
        ),
    ),
    Mutant(
        "a token's subscription outlives its user",
        "broker/access/rights.py",
        "            return grant.user == session.user\n",
        "            return True\n",
        (
            "tests/access/test_rights.py::test_a_subscription_outlives_a_change_of_its_user_where_he_may_have_it",
        ),
    ),
    Mutant(
        "a user who has been another gets the former's",
        "broker/core/registry.py",
        """        before = self._release(session)
        session.user = user
""",
        """        before = session.user
        session.user = user
""",
        ("tests/core/test_registry.py::test_a_user_has_many_fds_and_an_fd_one_user",),
    ),
    Mutant(
        "a reader needs no subscription where a hook decides",
        "broker/access/rights.py",
        """            if self.hook_decides and hook is None:
                raise Refused(DENIED, "only subscribers may read this topic")
""",
        "",
        ("tests/access/test_rights.py::test_nobody_reads_a_topic_that_he_may_not_subscribe_to",),
    ),
    Mutant(
        "anybody may send",
        "broker/access/rights.py",
        """            if not allows(config.may_send, session.user):
                raise Refused(DENIED)
            return config.may_send""",
        "            return config.may_send",
        ("tests/access/test_rights.py::test_a_direct_message_is_for_those_who_may_send",),
    ),
    Mutant(
        "a retained value for who may not have it",
        "broker/routing/retained.py",
        "            rules is None or not router.rights.receives(rules, value.topic, subscription)\n",
        "            rules is None\n",
        (
            "tests/access/test_rights.py::test_nobody_gets_through_a_group_or_a_retained_value_what_it_may_not_subscribe_to",
        ),
    ),
    Mutant(
        "who looks at a connection sees its secrets in protobuf",
        "broker/protocols/shown_protobuf.py",
        "        if isinstance(kind, Message) and not is_secret:\n",
        "        is_secret = False\n        if isinstance(kind, Message):\n",
        (
            "tests/protocols/test_shown_protobuf.py::test_no_part_of_a_secret_is_shown_wherever_the_message_is_cut",
            "tests/session/test_tracing.py::test_nobody_who_looks_can_take_a_session_over",
        ),
    ),
    Mutant(
        "a later request says itself where it comes from",
        "broker/http/api_server.py",
        "peer, address = self._node.new_share(), first.peer, first.address\n",
        'peer, address = self._node.new_share(), "unix", first.address\n',
        (
            "tests/session/test_addresses.py::test_each_request_on_a_connection_is_of_whom_the_same_word_says",
        ),
    ),
    Mutant(
        "an order for a user is followed by who is another by then",
        "broker/session/everywhere.py",
        "            fds = [fd for fd in fds if fd in of_user]\n",
        "            fds = [fd for fd in fds if of_user or fd]\n",
        (
            "tests/nodes/test_everywhere.py::test_an_order_for_a_user_is_not_followed_by_who_is_another_by_then",
        ),
    ),
    Mutant(
        "who has died with his node may publish as he once might",
        "broker/routing/reaper.py",
        "            self.router.rights.check_will(will.info.user, will.topic)\n",
        "",
        (
            "tests/nodes/test_reaper.py::test_a_will_of_a_killed_node_is_published_by_the_rules_of_then",
        ),
    ),
    Mutant(
        "anybody writes to an operator",
        "broker/routing/recipients.py",
        "        return self.speaks and self.is_apps\n",
        "        return self.speaks\n",
        ("tests/session/test_desk.py::test_nobody_writes_to_an_operator",),
    ),
    Mutant(
        "of whom the proxy does not know, his own word counts",
        "broker/access/proxies.py",
        "        if isinstance(peer, ClientAddress) and not peer.is_known:\n",
        "        if False:\n",
        (
            "tests/session/test_addresses.py::test_by_the_proxy_protocol_it_has_a_port",
            "tests/session/test_addresses.py::test_of_whom_the_proxy_does_not_know_nothing_is_believed",
        ),
    ),
    Mutant(
        "a hook's yes to one user is a yes to the next",
        "broker/session/questions.py",
        "self.failure is None and self.asked_as != self.client.peer.user\n",
        "self.failure is None and self.asked_as is None\n",
        (
            "tests/test_rights_at_the_act.py::test_a_hooks_yes_is_for_the_user_that_it_was_asked_about",
        ),
    ),
    Mutant(
        "ready JSON that is none goes out",
        "broker/core/values.py",
        "        one_text(bytes(value))\n        return\n",
        "        return\n",
        (
            "tests/core/test_values.py::test_ready_json_that_is_none_is_found",
            "tests/test_payloads.py::test_what_is_no_json_never_goes_out_as_json",
        ),
    ),
    Mutant(
        "a token that has expired while a hook was asked is as good",
        "broker/session/expiry.py",
        "    if isinstance(exp, int | float) and exp <= tokens.now()",
        "    if isinstance(exp, str) and 0 <= tokens.now()",
        (
            "tests/session/test_expiry.py::test_a_token_that_expires_while_a_hook_is_asked_has_expired",
        ),
    ),
    Mutant(
        "a reply of one who was not asked",
        "broker/routing/requests.py",
        "        if request is None or request.responder != responder:\n",
        "        if request is None:\n",
        ("tests/routing/test_requests.py::test_only_the_one_who_was_asked_may_answer",),
    ),
    Mutant(
        "a page of another origin",
        "broker/session/accept.py",
        """    if reason is not None:
        raise HeadError(403, reason)
""",
        "",
        ("tests/session/test_accept.py::test_a_kept_connection_is_served_as_a_fresh_one",),
    ),
    Mutant(
        "any key of the HTTP API",
        "broker/http/api.py",
        "        return ours is not None and hmac.compare_digest(key.encode(), ours.encode())\n",
        "        return ours is not None and len(key) == len(ours)\n",
        ("tests/http/test_api.py::test_only_the_key_opens_it",),
    ),
    Mutant(
        "a session of another is spoken for",
        "broker/http/fallbacks.py",
        "        return compare_digest(self._secret.encode(), secret.encode())\n",
        "        return bool(secret)\n",
        ("tests/http/test_fallbacks.py::test_a_session_is_reached_by_its_own_name_only",),
    ),
    Mutant(
        "a key counts for all connections without a user",
        "broker/routing/publishing.py",
        "        owner = owner_of(None if by is None else by.info)\n",
        '        owner = owner_of(by.info) if by is not None and by.user else "nobody"\n',
        ("tests/routing/test_publishing.py::test_a_key_is_its_publishers_own_and_its_topics",),
    ),
    Mutant(
        "a stranger says for whom it asks",
        "broker/access/proxies.py",
        """        if not self.trusts(peer):
            return peer
""",
        "",
        ("tests/access/test_proxies.py::test_the_client_is_the_last_that_is_no_proxy_of_ours",),
    ),
    Mutant(
        "an operator who may look acts",
        "broker/access/operators.py",
        "        return role is Role.VIEW or operator.role is Role.FULL\n",
        "        return True\n",
        ("tests/access/test_operators.py::test_each_key_gives_its_role",),
    ),
    Mutant(
        "wrong keys at any rate",
        "broker/access/operators.py",
        "            if not guesses.has(1, rate, GUESSES, now):\n",
        "            if not guesses.has(1, rate, 1000 * GUESSES, now):\n",
        (
            "tests/access/test_operators.py::test_who_guesses_is_slowed_down_and_the_right_key_with_him_but_nobody_elsewhere",
        ),
    ),
    Mutant(
        "a frame without a mask",
        "broker/transport/frames.py",
        """            elif length < 0:  # not masked
                break
            stop""",
        "            stop",
        (
            "tests/transport/test_frames.py::test_the_fast_lane_leaves_what_is_not_simple_byte_for_byte",
        ),
    ),
    Mutant(
        "text that is no UTF-8",
        "broker/transport/frames.py",
        """            if first == _FIN_TEXT and not payload.isascii():
                payload.decode()
""",
        "",
        (
            "tests/transport/test_frames.py::test_the_fast_lane_leaves_what_is_not_simple_byte_for_byte",
        ),
    ),
    Mutant(
        "a body whose end two parsers see in two places",
        "broker/transport/head.py",
        '    if codings and (lengths or head.version == "1.0"):\n',
        '    if codings and head.version == "1.0":\n',
        ("tests/transport/test_head.py::test_a_header_is_one_line_with_one_meaning",),
    ),
    Mutant(
        "a tags filter is ignored in a recovery",
        "broker/routing/subscriptions.py",
        "                missed = [each for each in missed if wanted.matches(each.tags)]\n",
        "                pass\n",
        (
            "tests/routing/test_subscriptions.py::test_recovery_picks_too_and_a_pattern_says_its_topic_beside_the_tags",
        ),
    ),
)
"""Who may do what."""

BUDGETS: Final = (
    Mutant(
        "half a hello is answered, and signed with all others when the rest comes",
        "broker/transport/tls_carrier.py",
        "            if len(message) >= max(whole, _MESSAGE_HEADER):\n",
        "            if message:\n",
        ("tests/transport/test_tls_carrier.py::test_a_hello_may_span_records",),
    ),
    Mutant(
        "changes of keys cost nothing",
        "broker/transport/tls_carrier.py",
        "        self._party.spend(work)\n",
        "",
        (
            "tests/transport/test_tls_carrier.py::test_records_are_paid_for_before_they_are_opened_and_few_at_a_time",
        ),
    ),
    Mutant(
        "what a reload has forgotten is given out until its turn comes",
        "broker/core/history.py",
        "        if not self._sweeps.begun or not self._sweeps.touch(topic):\n",
        "        if self._sweeps.begun:\n",
        (
            "tests/core/test_history.py::test_what_is_to_be_forgotten_is_so_before_it_is_used",
            "tests/routing/test_router.py::test_what_is_yet_to_be_forgotten_after_a_reload_is_given_to_nobody",
        ),
    ),
    Mutant(
        "a topic that was forgotten is published to while the log still has its epoch",
        "broker/engines/sqlite.py",
        "        self._store.touch(topic)  # or its former epoch might be in the log when this is forgotten\n",
        "",
        (
            "tests/engines/test_sqlite.py::test_topics_that_are_forgotten_are_in_several_commits_and_those_in_use_first",
            "tests/engines/test_sqlite_crashes.py::test_a_position_never_gets_a_second_meaning",
        ),
    ),
    Mutant(
        "a commit brings something to a topic before it says where that is",
        "broker/engines/sqlite.py",
        "            if item.topic in unwritten:\n",
        "            if item.topic in unwritten and False:\n",
        (
            "tests/engines/test_sqlite.py::test_topics_that_are_forgotten_are_in_several_commits_and_those_in_use_first",
        ),
    ),
    Mutant(
        "of what an engine gives back each publication is a round of writes",
        "broker/routing/router.py",
        "        work = meter.done - before - (office.written - written)\n",
        "        work = meter.done - before\n",
        (
            "tests/routing/test_router.py::test_the_work_of_a_step_is_told_without_the_writes_that_come_later",
        ),
    ),
    Mutant(
        "deadlines of answered requests stay until their time",
        "broker/routing/requests.py",
        "            self._due.sweep(len(self._requests))\n",
        "",
        (
            "tests/routing/test_requests.py::test_deadlines_of_answered_requests_are_swept_away_a_few_at_a_time",
        ),
    ),
    Mutant(
        "who publishes one waits for all that others have put",
        "broker/engines/waiting.py",
        "        self._queue.put(item, weight, party, topic)\n",
        "        self._queue.put(item, weight, None, topic)\n",
        (
            "tests/engines/test_sqlite.py::test_a_publication_waits_for_a_commit_and_its_own_and_not_for_a_flood",
        ),
    ),
    Mutant(
        "who has little on its way waits for room",
        "broker/engines/waiting.py",
        "        return self.bytes >= FULL_BYTES and self._of.get(party, 0) + size > LITTLE_BYTES\n",
        "        return self.bytes >= FULL_BYTES\n",
        (
            "tests/engines/test_waiting.py::test_who_has_little_on_its_way_finds_room_where_others_have_filled_it",
        ),
    ),
    Mutant(
        "a line that comes back begins where it was",
        "broker/core/fair_queue.py",
        "            line.given = max(line.given, self._now)\n",
        "            pass\n",
        ("tests/core/test_fair_queue.py::test_who_comes_late_has_saved_up_nothing",),
    ),
    Mutant(
        "any amount waits in Redis in no order but its own",
        "broker/engines/redis_log.py",
        "            while self._leaves_much_unread():\n",
        "            while False:\n",
        (
            "tests/engines/test_redis_log.py::test_no_more_is_appended_while_much_has_yet_to_be_read_back",
        ),
    ),
    Mutant(
        "close to the limit anybody gets more",
        "broker/core/memory.py",
        "        return self._seen + size <= NEAR * self.limit\n",
        "        return self._seen + size <= 100 * self.limit\n",
        ("tests/core/test_memory.py::test_close_to_the_limit_who_is_heavy_gets_no_more",),
    ),
    Mutant(
        "one connection may hold anything",
        "broker/core/memory.py",
        "        if self.bytes + size > budget.connection_room:\n",
        "        if self.bytes + size > 100 * budget.connection_room:\n",
        ("tests/session/test_memory.py::test_a_connection_has_a_bound_on_all_that_it_holds",),
    ),
    Mutant(
        "what was charged is not given back",
        "broker/core/memory.py",
        "            self.budget.charge(part, -held)\n",
        "            pass\n",
        (
            "tests/session/test_memory.py::test_all_that_was_charged_is_given_back_when_all_have_gone",
        ),
    ),
    Mutant(
        "the lightest gives way first",
        "broker/core/memory.py",
        "            heap.append((-sum(excess for excess, _, _ in members), number, members))\n",
        "            heap.append((sum(excess for excess, _, _ in members), number, members))\n",
        ("tests/session/test_memory.py::test_the_heaviest_gives_way_and_the_small_notice_nothing",),
    ),
    Mutant(
        "a thousand connections of one party are a thousand",
        "broker/core/memory.py",
        "                members = parties.setdefault(holding.holder.party, [])\n",
        '                members = parties.setdefault(f"{number}", [])\n',
        ("tests/core/test_memory.py::test_a_thousand_connections_of_one_party_are_one",),
    ),
    Mutant(
        "who holds little gives way",
        "broker/core/memory.py",
        "        return max(0, self.bytes + holder.own_waiting() - FREE_BYTES)\n",
        "        return self.bytes + holder.own_waiting()\n",
        (
            "tests/core/test_memory.py::test_the_heaviest_gives_way_first_and_no_more_than_is_needed",
        ),
    ),
    Mutant(
        "newcomers though memory is short",
        "broker/session/accept.py",
        """    if services.memory.is_exhausted:
        raise HeadError(503, "memory is short")
""",
        "",
        ("tests/session/test_memory.py::test_where_nobody_holds_much_newcomers_are_refused",),
    ),
    Mutant(
        "one sender fills the outbox of who is behind",
        "broker/routing/letters.py",
        "            own is not None and own.is_over(self.outbox, SHARE)\n",
        "            False\n",
        (
            "tests/routing/test_letters.py::test_a_publisher_has_a_quarter_of_the_outbox_of_who_is_behind",
        ),
    ),
    Mutant(
        "all senders fill the outbox of who is behind",
        "broker/routing/letters.py",
        "        return self._total.is_over(self.outbox, SHARE // 2) or (\n",
        "        return (\n",
        (
            "tests/routing/test_letters.py::test_others_have_shares_of_their_own_and_all_together_a_half",
        ),
    ),
    Mutant(
        "requests at any rate",
        "broker/access/rate_limits.py",
        "        if all(bucket.has(cost, rate, burst, now) for bucket, cost, rate, burst in demands):\n",
        "        if True:\n",
        ("tests/access/test_rate_limits.py::test_requests_beyond_the_rate_are_answered_with_111",),
    ),
    Mutant(
        "who goes on beyond the rate stays",
        "broker/access/rate_limits.py",
        "        if not usage.excess.has(1, config.excess_rate, config.excess_burst, now):\n",
        "        if not usage.excess.has(1, config.excess_rate, 1000 * config.excess_burst, now):\n",
        ("tests/access/test_rate_limits.py::test_a_connection_that_goes_on_for_long_is_sent_away",),
    ),
    Mutant(
        "a session takes the loop for itself",
        "broker/routing/turns.py",
        """        if self.admits(work):
            return True
        self.is_used_up = True
""",
        """        return True
        self.is_used_up = True
""",
        (
            "tests/session/test_dispatch.py::test_a_thousand_commands_at_once_leave_others_their_turn",
        ),
    ),
    Mutant(
        "nobody is called behind a party that was cancelled",
        "broker/routing/turns.py",
        "        return not (self._called or self._lot)\n",
        "        return not (self._called or self._wanted)\n",
        (
            "tests/routing/test_turns.py::test_nobody_waits_behind_parties_that_were_cancelled_and_have_not_run_since",
        ),
    ),
    Mutant(
        "what a turn leaves is kept for other acts",
        "broker/core/work.py",
        "            self.slice = min(self.slice, SLICE)\n",
        "            pass\n",
        (
            "tests/core/test_work.py::test_a_turn_for_a_large_act_leaves_no_more_than_a_slice_for_another",
        ),
    ),
    Mutant(
        "all who come are let in at once",
        "broker/routing/turns.py",
        "        if self._entered < ROUND and self.is_free:\n",
        "        if self.is_free:\n",
        (
            "tests/session/test_dispatch.py::test_hundreds_that_come_at_once_are_let_in_a_few_at_a_time",
        ),
    ),
    Mutant(
        "everybody's turn at once",
        "broker/routing/turns.py",
        "        while self._lot and left > 0:\n",
        "        while self._lot:\n",
        ("tests/session/test_dispatch.py::test_what_many_ask_for_at_once_is_done_a_few_at_a_time",),
    ),
    Mutant(
        "any share of the room is the first to give way",
        "broker/core/idempotency.py",
        """            heaviest = self._shares.heaviest()
            assert heaviest is not None
            self._drop(next(iter(heaviest.kept.values())))
""",
        "            self._drop(next(iter(self._order)))\n",
        ("tests/core/test_idempotency.py::test_a_flood_of_keys_costs_others_nothing",),
    ),
    Mutant(
        "a reply beside a reply",
        "broker/session/dispatch.py",
        "        return self.peer.outbox.replies_wait and self.peer.is_established\n",
        "        return False\n",
        (
            "tests/session/test_dispatch.py::test_a_client_that_asks_for_a_lot_gets_all_of_it_one_after_the_other",
        ),
    ),
    Mutant(
        "a will that weighs nothing",
        "broker/routing/wills.py",
        "        peer.holding.charge(Part.WILLS, more)\n",
        "        peer.holding.charge(Part.WILLS, 0)\n",
        (
            "tests/session/test_memory.py::test_close_to_the_limit_a_large_will_is_refused_and_a_small_one_is_not",
        ),
    ),
    Mutant(
        "a trace at any rate",
        "broker/core/trace.py",
        "        left = int(self._bucket.left(RATE, ENTRIES_MOST, now))\n",
        "        left = ENTRIES_MOST\n",
        ("tests/core/test_trace.py::test_a_reader_that_keeps_up_gets_so_many_a_second",),
    ),
)
"""Who pays."""

ENGINES: Final = (
    Mutant(
        "acknowledged before it is committed",
        "broker/engines/sqlite.py",
        """        if batch.records or batch.meta is not None:
            await self._run_blocking""",
        """        if batch.records or batch.meta is not None:
            for item in batch.items:
                if isinstance(item, Submission):
                    for done in item.dones:
                        done(None)
                    item.dones.clear()
            await self._run_blocking""",
        (
            "tests/engines/test_sqlite.py::test_what_comes_while_a_commit_is_under_way_is_in_the_next_one",
        ),
    ),
    Mutant(
        "an epoch that is not written",
        "broker/engines/sqlite.py",
        """        self._note_unwritten(topic)
        return new_epoch(topic)
""",
        "        return new_epoch(topic)\n",
        (
            "tests/engines/test_sqlite.py::test_a_full_disk_refuses_what_is_to_be_kept_and_nothing_else_until_there_is_room",
        ),
    ),
    Mutant(
        "fds that are not leased",
        "broker/engines/sqlite.py",
        "        if next_fd + FD_LEASE // 2 > self._meta.next_fd:\n",
        "        if next_fd + FD_LEASE // 2 > self._meta.next_fd + 10 * FD_LEASE:\n",
        (
            "tests/engines/test_sqlite.py::test_fds_go_on_after_a_kill_beyond_all_that_may_have_been_given_out",
        ),
    ),
    Mutant(
        "what comes while the disk fails is not refused",
        "broker/engines/sqlite.py",
        "            self._refuse(self._waiting.clear(), sink, self._failing)\n",
        "            self._waiting.clear()\n",
        (
            "tests/engines/test_sqlite.py::test_what_was_let_in_before_the_disk_failed_and_is_submitted_later_is_refused",
        ),
    ),
    Mutant(
        "redis: nobody looks for what is before an entry",
        "broker/engines/redis_log.py",
        "        if before != self.place or lineage != self.lineage:\n",
        "        if lineage != self.lineage:\n",
        (
            "tests/engines/test_redis_log.py::test_an_entry_that_names_another_before_it_is_a_loss_that_is_told",
        ),
    ),
    Mutant(
        "redis: another lineage is as good",
        "broker/engines/redis_log.py",
        "        if before != self.place or lineage != self.lineage:\n",
        "        if before != self.place:\n",
        (
            "tests/engines/test_redis_log.py::test_an_entry_of_another_lineage_is_a_loss_though_the_place_is_ours",
        ),
    ),
    Mutant(
        "redis: a batch is sent again that was applied",
        "broker/engines/redis_log.py",
        "            if flight.counter <= done:\n",
        "            if flight.counter <= done - 1:\n",
        (
            "tests/engines/test_redis_log.py::test_what_was_applied_is_not_sent_again_and_all_behind_it_is",
        ),
    ),
    Mutant(
        "redis: a view is not merged with what came meanwhile",
        "broker/engines/redis_topics.py",
        "        return state is None or state[0] == Position(logged.first - 1, logged.epoch)\n",
        "        return True\n",
        (
            "tests/engines/test_redis_topics.py::test_a_run_that_does_not_follow_a_view_makes_its_topic_unknown",
        ),
    ),
    Mutant(
        "redis: keys that were evicted are not noticed",
        "broker/engines/redis_topics.py",
        """        if not ends or ends[-1] != self.position.offset:
            self.runs = []
            return
""",
        "",
        (
            "tests/engines/test_redis_topics.py::test_a_view_has_what_leads_up_to_the_top_and_nothing_else",
        ),
    ),
    Mutant(
        "redis: pieces of two epochs are joined to one history",
        "broker/engines/redis_scripts.py",
        "if m ~= ARGV[3] then return false end\n",
        "",
        ("tests/engines/test_redis_pieces.py::test_pieces_of_two_epochs_are_not_joined",),
    ),
    Mutant(
        "redis: a piece that came gives no more time",
        "broker/engines/redis.py",
        "            self.due.deadline = trio.current_time() + FETCH_SECONDS\n",
        "",
        ("tests/engines/test_redis_pieces.py::test_pieces_that_keep_coming_are_waited_for",),
    ),
    Mutant(
        "a will of a dead node is published by each that buries it",
        "broker/routing/reaper.py",
        "        options = PublishOptions(retain=will.retain, key=key, on_behalf_of=will.info)\n",
        "        options = PublishOptions(retain=will.retain, on_behalf_of=will.info)\n",
        (
            "tests/nodes/test_reaper.py::test_a_will_is_published_once_though_the_node_that_did_so_dies_before_it_is_cleared",
        ),
    ),
    Mutant(
        "a queue group gives to two",
        "broker/routing/queue_groups.py",
        "            shares.setdefault(member, []).append(publication)\n",
        """            for each in {member, next(iter(self.group.members.values()))}:
                shares.setdefault(each, []).append(publication)
""",
        ("tests/routing/test_queue_groups.py::test_each_publication_goes_to_one_member_in_turn",),
    ),
)
"""What is kept, and once."""

MUTANTS: Final = (
    *CAPS,
    *DEADLINES,
    *CONTAINMENT,
    *ORDER,
    *RIGHTS,
    *BUDGETS,
    *ENGINES,
)
