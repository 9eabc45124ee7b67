// A chat on the broker, with an unmodified Centrifuge client.
//
// A room is the topic `room.NAME`; a direct message is a publication to `fd:N`. The broker knows
// connections by number only, so people tell each other their names, by direct messages too.
"use strict";

(() => {
  const $ = (id) => document.getElementById(id);
  const HISTORY = 30;
  const INTRODUCTIONS = 50; // in a larger room a name is known once its owner has spoken

  let fd = 0;
  let room = null; // the Centrifuge subscription
  const names = new Map(); // fd → name
  const here = new Set(); // fds in this room

  // what is shown

  function show(kind, who, text) {
    const list = $("messages");
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    const item = document.createElement("li");
    item.className = kind;
    if (who) {
      const head = document.createElement("b");
      head.textContent = who;
      item.append(head);
    }
    item.append(text); // a string becomes a text node: never markup
    list.append(item);
    if (atEnd) list.scrollTop = list.scrollHeight;
  }

  const note = (text) => show("note", "", text);
  const failed = (text) => show("note bad", "", text);
  const nameOf = (n) => (names.get(n) ? `${names.get(n)} · fd ${n}` : `fd ${n}`);
  const myName = () => $("name").value.trim();

  // Not all that comes was said by such a page: a command, a backend or a program sends any JSON.
  const isObject = (data) => typeof data === "object" && data !== null && !Array.isArray(data);

  function textOf(data) {
    const text = isObject(data) && "text" in data ? data.text : data;
    return typeof text === "string" ? text : JSON.stringify(text);
  }

  function showPeople() {
    const items = [...here].sort((a, b) => a - b).map((n) => {
      const button = document.createElement("button");
      const number = document.createElement("span");
      number.textContent = n === fd ? `fd ${n} (you)` : `fd ${n}`;
      button.type = "button";
      button.title = `Write to fd ${n}`;
      button.append(names.get(n) ? `${names.get(n)} ` : "", number);
      button.addEventListener("click", () => {
        $("to").value = n;
        $("text").focus();
      });
      const item = document.createElement("li");
      item.append(button);
      return item;
    });
    $("people").replaceChildren(...items);
    $("count").textContent = here.size ? `(${here.size})` : "";
  }

  function learnName(n, name) {
    if (typeof name === "string" && name) names.set(n, name.slice(0, 40));
    else names.delete(n);
    showPeople();
  }

  // the connection

  // Some networks let no WebSocket pass: then the same goes over plain HTTP.
  const at = (path) => new URL(path, location.href).href;
  const centrifuge = new Centrifuge([
    { transport: "websocket", endpoint: at("connection/websocket").replace(/^http/, "ws") },
    { transport: "http_stream", endpoint: at("connection/http_stream") },
    { transport: "sse", endpoint: at("connection/sse") },
  ], { emulationEndpoint: at("emulation") });

  function state(word) {
    $("state").textContent = word;
    $("state").dataset.state = word;
  }

  // Where tokens are required, the page asks for one; it stays in this tab.
  const WANTS_TOKEN = [101, 109, 3500, 3502, 3507];

  function askForToken() {
    $("key").hidden = $("why").hidden = false;
    $("token").focus();
  }

  function useToken() {
    const token = $("token").value.trim();
    sessionStorage.setItem("token", token);
    centrifuge.disconnect();
    centrifuge.setToken(token);
    centrifuge.connect();
  }

  centrifuge.on("connecting", () => state("connecting"));
  centrifuge.on("error", ({ error }) => WANTS_TOKEN.includes(error.code) && askForToken());
  centrifuge.on("disconnected", (context) => {
    state("disconnected");
    if (context.code === 0) return; // our own doing, to come back with another token
    if (context.code === 1 || WANTS_TOKEN.includes(context.code)) { // 1: it has expired
      askForToken();
      return failed(`Disconnected: ${context.reason}. Give a token that is valid.`);
    }
    failed(`Disconnected: ${context.reason}. Reload to try again.`);
  });
  centrifuge.on("connected", (context) => {
    state("connected");
    $("key").hidden = $("why").hidden = !$("token").value;
    names.delete(fd);
    fd = Number(context.client);
    learnName(fd, myName());
    $("me").textContent = `you are fd ${fd}`;
  });
  // Publications on what the server subscribed us to: our own `fd:N`.
  centrifuge.on("publication", ({ data, info }) => {
    const from = Number(info?.client); // nobody's where a backend or the program sent it
    if (from && isObject(data) && "name" in data) learnName(from, data.name);
    if (from && isObject(data) && "ask" in data) {
      if (data.ask) introduce(from, false);
    } else {
      show("direct", `${from ? nameOf(from) : "server"} → you`, textOf(data));
    }
  });

  // What the server pushes to this fd: `broker.push`, the API, an operator at the dashboard.
  centrifuge.on("message", ({ data }) => show("direct", "server → you", textOf(data)));

  async function introduce(to, ask) {
    // Gone in the meantime: nothing to tell.
    await centrifuge.publish(`fd:${to}`, { name: myName(), ask }).catch(() => {});
  }

  // a room

  function enter(name) {
    if (room) {
      room.unsubscribe();
      centrifuge.removeSubscription(room);
    }
    $("messages").replaceChildren();
    here.clear();
    showPeople();
    let last = 0; // offset of the newest message shown
    let waiting = []; // what comes while the history is fetched

    function showMessage({ data, info, offset }) {
      if (offset && offset <= last) return;
      last = offset ?? last;
      const from = Number(info?.client);
      const called = isObject(data) && typeof data.name === "string" && data.name ? `${data.name} · ` : "";
      show(from === fd ? "mine" : "", from ? `${called}fd ${from}` : "server", textOf(data));
    }

    const sub = centrifuge.newSubscription(`room.${name}`, { recoverable: true, joinLeave: true });
    room = sub;
    sub.on("publication", (publication) => (waiting ? waiting.push(publication) : showMessage(publication)));
    sub.on("join", ({ info }) => {
      const n = Number(info.client);
      here.add(n);
      showPeople();
      if (n !== fd) note(`fd ${n} came`);
    });
    sub.on("leave", ({ info }) => {
      const n = Number(info.client);
      note(`${nameOf(n)} left`);
      here.delete(n);
      names.delete(n);
      showPeople();
    });
    sub.on("error", ({ error }) => failed(`Room ${name}: ${error.message}`));
    sub.on("unsubscribed", ({ reason, code }) => code && failed(`Out of room ${name}: ${reason}`));
    sub.on("subscribed", async (context) => {
      if (context.wasRecovering && !context.recovered) note("Some messages were missed.");
      try {
        if (waiting) {
          const { publications } = await sub.history({ limit: HISTORY, reverse: true });
          publications.reverse().forEach(showMessage);
          waiting.forEach(showMessage);
          waiting = null;
        }
        const { clients } = await sub.presence();
        here.clear();
        Object.keys(clients).forEach((client) => here.add(Number(client)));
        showPeople();
        [...here].filter((n) => n !== fd).slice(0, INTRODUCTIONS).forEach((n) => introduce(n, true));
      } catch (error) {
        if (room === sub) failed(`Room ${name}: ${error.message}`);
      }
    });
    sub.subscribe();
  }

  // the forms

  $("who").addEventListener("submit", (event) => {
    event.preventDefault();
    // `.`, `*`, `>`, `:` and spaces mean something in a topic.
    const name = $("room").value.trim().replace(/[^\p{L}\p{N}_-]+/gu, "-") || "lobby";
    $("room").value = name;
    sessionStorage.setItem("name", myName());
    sessionStorage.setItem("room", name);
    learnName(fd, myName());
    if ($("token").value.trim() !== (sessionStorage.getItem("token") ?? "")) useToken();
    if (room?.channel !== `room.${name}`) enter(name);
    else [...here].filter((n) => n !== fd).slice(0, INTRODUCTIONS).forEach((n) => introduce(n, false));
    $("text").focus();
  });
  $("name").addEventListener("change", () => $("who").requestSubmit());

  // What is meant for one person never goes to all by mistake: a slip is an error, and the next
  // message begins with an empty "To".
  const FD = /^[1-9][0-9]{0,18}$/;
  const SLASH = /^\s*[/／⁄∕⧸]/; // what keyboards and autocorrection make of it, too

  function mistake(to, text) {
    if (to && !FD.test(to)) return `“${to}” is no fd: a number such as 7, or empty for everybody.`;
    if (SLASH.test(text) && !text.startsWith("//")) {
      return "a slash is no command here. Write to one person with “To fd”; begin with // to send it as text.";
    }
    return "";
  }

  $("say").addEventListener("submit", async (event) => {
    event.preventDefault();
    const typed = $("text").value;
    const to = $("to").value.trim();
    const wrong = mistake(to, typed);
    if (wrong) return failed(`Not sent: ${wrong}`);
    const text = typed.startsWith("//") ? typed.slice(1) : typed;
    $("text").value = $("to").value = "";
    try {
      if (to) {
        await centrifuge.publish(`fd:${to}`, { name: myName(), text });
        show("mine direct", `you → ${nameOf(Number(to))}`, text);
      } else {
        await room.publish({ name: myName(), text });
      }
    } catch (error) {
      const why = error.code === 102 ? `Nobody here is fd ${to}.` : `Not sent: ${error.message}`;
      // Somebody who is writing the next message is not interrupted.
      if ($("text").value || $("to").value) return failed(`${why} You wrote: ${text}`);
      failed(why);
      $("text").value = typed;
      $("to").value = to; // both, or sending it again would send it to all
    }
  });

  // sessionStorage is per tab: two tabs are two people.
  $("name").value = sessionStorage.getItem("name") ?? "";
  $("room").value = sessionStorage.getItem("room") ?? "lobby";
  $("token").value = sessionStorage.getItem("token") ?? "";
  centrifuge.setToken($("token").value);
  $("token").addEventListener("change", useToken);
  enter($("room").value);
  centrifuge.connect();
  $("text").focus();
})();
