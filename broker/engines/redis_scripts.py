"""The scripts in Lua that Redis runs for us, in one step each, and the names of the keys.

Everything of one log lies under one prefix `p` with a hash tag, so that a cluster keeps it together:

==============  ==========================  ==========================================================
key             type                        what
==============  ==========================  ==========================================================
`p:state`       hash `l b r c v`            lineage, bytes of the log so far, those when the lineage
                                            began, epochs begun, format
`p:log`         stream, id = bytes so far   one entry per batch; the last `LOG_BYTES` of them
`p:done:NODE`   string                      the last batch of a node that was applied
`p:m:TOPIC`     hash `e t s l x y`          epoch, top, size, ttl, and when either key was touched
`p:h:TOPIC`     stream, id = last offset    what is kept, a run in each entry
`p:once:KEY`    string                      the position of a publish with a key
`p:r`, `p:ro`   hash, sorted set            retained values, and their order
`p:rb`          string                      their bytes
`p:fd`          string                      the last fd that was given to a node
`p:nodes`       hash node: ms               the nodes that live, and when each has beaten last
`p:dead`        hash node: node             the dead whose cards are left, and who deals with them
`p:was:NODE`    string, 7 days              it was declared dead
`p:n:NODE`      hash name: value            its notices
`p:in:NODE`     stream, id = that of the    messages for it alone
                batch in the log, number
`p:c:NODE:D`    hash name: value            its cards in drawer D, `len:owner` before the value
`p:d:NODE`      set                         its drawers
`p:w:D`         set                         the nodes with cards in a drawer
==============  ==========================  ==========================================================

An entry of the log begins with a head, `node counter before lineage ms`, and has for each run a header,
`flags number first epoch size ttl topic`, with its publications. `before` is the entry before, so a
reader sees that it misses one. The flags of a run:

====  ==============================================================================================
`k`   the history keeps it
`n`   it is not kept, and passes in its place
`e`   the same of a topic without history: its epoch, if it had one, is over
`v`   its last publication is the topic's retained value
`c`   the same, and that is null: there is none any more
`r`   behind these: somebody wants a report of it, also from nodes where nobody listens
`d`   a repetition of a publish with a key: it is not published again
`u`   as `n`, to a user who is connected somewhere
`x`   the same to one who is not: nobody gets it
`R`   what the topic keeps is removed
`F`   the topic is forgotten, with its epoch
`A`   a message for all nodes
`N`   a notice; `M`: it is taken down
`G`   a node has gone
====  ==============================================================================================

A batch may hold what is in no entry as well: `T`, a message for the node that stands for the topic; `C` and
`D`, a card that is filed or taken out, of the name that stands for the key.

An epoch begins with the lineage, so all of them change with it. Numbers are written by `%.0f`: Lua would
round them at 14 digits.
"""

from typing import Final

from broker.engines.redis_wire import Script

FORMAT: Final = 1
"""Stands in the state; a broker works with what has this number."""

_COMMON: Final = """
local p = ARGV[1]
local function text(n) return string.format('%.0f', n) end
local function now()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
-- The lineage and the last entry of the log. Where there is no state, all is new.
local function state(token)
  local s = redis.call('HMGET', p .. ':state', 'l', 'b', 'r')
  if s[1] then return s[1], tonumber(s[2]), tonumber(s[3]) end
  redis.call('DEL', p .. ':log')
  redis.call('HSET', p .. ':state', 'l', token, 'b', 0, 'r', 0, 'v', 1)
  return token, 0, 0
end
-- Append to a stream; false where another program has put what stands in the way: an entry under a higher id, or
-- no stream. Then all of it is gone.
local function put(key, ...)
  local done = redis.pcall('XADD', key, ...)
  local why = type(done) == 'table' and done.err
  if not why then return true end
  if not (string.find(why, 'smaller') or string.find(why, 'exhausted') or string.find(why, 'WRONGTYPE')) then error(why) end
  redis.call('DEL', key)
  return false
end
-- Put an entry into the log; the fields after the first two are headers and data of so many bytes.
local function enter(node, counter, last, lineage, ms, fields, bytes, most)
  fields[1], fields[2] = '', table.concat({node, counter, text(last), lineage, text(ms)}, ' ')
  last = last + bytes + #fields[2]
  local id, oldest = text(last), text(math.max(0, last - tonumber(most)))
  -- Who was behind is told so, as this entry names the one before it.
  if not put(p .. ':log', 'MINID', '~', oldest, id .. '-0', unpack(fields)) then
    put(p .. ':log', 'MINID', '~', oldest, id .. '-0', unpack(fields))
  end
  redis.call('HSET', p .. ':state', 'b', id)
  return last
end
-- What a set or a hash holds; nothing where another program has put something else in its place.
local function ours(...)
  local found = redis.pcall(...)
  return found.err and {} or found
end
-- Whether a card of any node that lives is in a drawer; the nodes.
local function living(drawer)
  local found = {}
  for _, node in ipairs(ours('SMEMBERS', p .. ':w:' .. drawer)) do
    if redis.call('HEXISTS', p .. ':nodes', node) == 1 then found[#found + 1] = node end
  end
  return found
end
local function take_out(node, drawer, name)
  local cards = p .. ':c:' .. node .. ':' .. drawer
  redis.call('HDEL', cards, name)
  if redis.call('EXISTS', cards) == 0 then
    redis.call('SREM', p .. ':w:' .. drawer, node)
    redis.call('SREM', p .. ':d:' .. node, drawer)
  end
end
-- The epoch of a topic; a new one where it has none of this lineage.
local function epoch_of(topic, lineage)
  local m = redis.pcall('HMGET', p .. ':m:' .. topic, 'e', 't', 's', 'l', 'x', 'y')
  if m.err then redis.call('DEL', p .. ':m:' .. topic) end  -- another program's: it is no hash
  if m[1] and string.sub(m[1], 1, #lineage) == lineage then
    return m[1], tonumber(m[2]), tonumber(m[3]), tonumber(m[4]), tonumber(m[5]), tonumber(m[6])
  end
  local number = redis.call('HINCRBY', p .. ':state', 'c', 1)
  redis.call('UNLINK', p .. ':h:' .. topic)
  return lineage .. string.format('%x', number), 0, 0, 0, 0, 0
end
-- The next runs of a history, of those that end from one offset on up to another: as many as a piece may hold.
local function piece(topic, from, top, most, most_bytes)
  local found, bytes, count = {}, 0, 1
  while from <= top do
    local some = redis.pcall('XRANGE', p .. ':h:' .. topic, text(from) .. '-0', text(top) .. '-0', 'COUNT', count)
    if some.err then return {} end  -- another program's: it is no stream
    for _, each in ipairs(some) do
      found[#found + 1] = each
      for _, field in ipairs(each[2]) do bytes = bytes + #field end
    end
    if #some < count or #found >= most or bytes >= most_bytes then break end
    from = tonumber(string.match(some[#some][1], '^%d+')) + 1
    -- As many again, so that large ones end it before they are many.
    count = math.min(#found, most - #found, 256)
  end
  return found
end
"""

APPEND: Final = Script(
    _COMMON
    + """
-- ARGV: p, node, counter, token, bytes of the log, ms of an idle epoch, bytes of retained values, then for
-- each run: flags, topic, size, ttl, count, key, data.
local node, counter = ARGV[2], tonumber(ARGV[3])
local lineage, last = state(ARGV[4])
if redis.call('HEXISTS', p .. ':nodes', node) == 0 then return {-1, lineage, last} end
local done = p .. ':done:' .. node
if counter <= tonumber(redis.call('GET', done) or '0') then return {0, lineage, last} end
local ms, idle = now(), tonumber(ARGV[6])
local fields, told = {'', ''}, {}
local bytes, number, stamp = 0, 0, text(ms)

local function keep(topic, size, ttl, count, data)
  local epoch, top, former, lived, touched, lives = epoch_of(topic, lineage)
  local m, h = p .. ':m:' .. topic, p .. ':h:' .. topic
  local first = top + 1
  top = top + count
  -- A key lives on a while, so that its end is not put off by each run.
  local touch = touched + math.max(idle, ttl) / 8 < ms
  if touch then touched = ms end
  local prolong = lives < ms + ttl
  if prolong then lives = ms + ttl + math.floor(ttl / 4) + 1000 end
  local id = text(top)
  if touch or prolong or size ~= former or ttl ~= lived then
    redis.call('HSET', m, 'e', epoch, 't', id, 's', size, 'l', text(ttl), 'x', text(touched), 'y', text(lives))
  else  -- as nearly always
    redis.call('HSET', m, 't', id)
  end
  if touch then redis.call('PEXPIRE', m, text(math.max(idle, ttl) * 1.25 + 1000)) end
  if not put(h, 'MINID', '~', text(math.max(0, top - size + 1)) .. '-0', id .. '-0', stamp, data) then
    redis.call('DEL', m)
    return keep(topic, size, ttl, count, data)  -- in another epoch: what was kept is gone
  end
  if prolong then redis.call('PEXPIRE', h, text(lives - ms)) end
  return first, epoch
end

local function retain(topic, value, clear)
  local r, order, sum = p .. ':r', p .. ':ro', p .. ':rb'
  local function drop(name)
    local former = redis.call('HGET', r, name)
    if former then redis.call('DECRBY', sum, #former + #name) end
    redis.call('HDEL', r, name)
    redis.call('ZREM', order, name)
  end
  drop(topic)
  if clear then return end
  redis.call('HSET', r, topic, value)
  redis.call('ZADD', order, text(last + bytes), topic)
  local held = redis.call('INCRBY', sum, #value + #topic)
  -- A bound that was lowered is reached little by little, by more than each value adds.
  local dropped, enough = 0, held - 4 * (#value + #topic)
  while held > tonumber(ARGV[7]) and (dropped < 256 or held > enough) do
    dropped = dropped + 1
    local oldest = redis.call('ZRANGE', order, 0, 0)[1]
    if not oldest then break end
    drop(oldest)
    held = tonumber(redis.call('GET', sum))
  end
end

for i = 8, #ARGV, 7 do
  local flags, topic, size, ttl = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local key, data = ARGV[i + 5], ARGV[i + 6]
  local first, epoch = 0, '-'
  local kind = string.sub(flags, 1, 1)
  local once = key ~= '' and kind ~= 'C' and kind ~= 'D' and p .. ':once:' .. key
  local before = once and redis.call('GET', once)
  if kind == 'T' then
    if redis.call('HEXISTS', p .. ':nodes', topic) == 1 then told[#told + 1] = {topic, data} end
    flags = nil
  elseif kind == 'C' then
    if redis.call('HSET', p .. ':c:' .. node .. ':' .. topic, key, data) == 1 then
      redis.call('SADD', p .. ':w:' .. topic, node)
      redis.call('SADD', p .. ':d:' .. node, topic)
    end
    flags = nil
  elseif kind == 'D' then
    take_out(node, topic, key)
    flags = nil
  elseif before then
    first, epoch = string.match(before, '^(%d+) (.*)$')
    flags, data = 'd', ''
  else
    if kind == 'k' then
      first, epoch = keep(topic, size, ttl, tonumber(ARGV[i + 4]), data)
    elseif kind == 'e' or kind == 'F' then
      redis.call('UNLINK', p .. ':m:' .. topic, p .. ':h:' .. topic)
    elseif kind == 'R' then
      redis.call('UNLINK', p .. ':h:' .. topic)
    elseif kind == 'u' then
      if #living(topic) == 0 then flags, data = 'x', '' end
    elseif kind == 'N' then
      redis.call('HSET', p .. ':n:' .. node, topic, data)
    elseif kind == 'M' then
      redis.call('HDEL', p .. ':n:' .. node, topic)
    end
    first = text(first)
    local last_flag = #flags > 1 and string.match(flags, '[vc]')
    if last_flag then
      local offset = kind == 'k' and text(first + tonumber(ARGV[i + 4]) - 1) or '0'
      retain(topic, offset .. ' ' .. data, last_flag == 'c')
    end
    if once then redis.call('SET', once, first .. ' ' .. epoch, 'EX', 300) end
  end
  if flags then
    local header = table.concat({flags, number, first, epoch, ARGV[i + 2], ARGV[i + 3], topic}, ' ')
    fields[#fields + 1], fields[#fields + 2] = header, data
    bytes = bytes + #header + #data
  end
  number = number + 1
end
last = enter(node, ARGV[3], last, lineage, ms, fields, bytes, ARGV[5])
for n, each in ipairs(told) do
  local oldest = text(math.max(0, last - tonumber(ARGV[5])))
  local inbox, id = p .. ':in:' .. each[1], text(last) .. '-' .. n
  if not put(inbox, 'MINID', '~', oldest, id, node, each[2]) then put(inbox, 'MINID', '~', oldest, id, node, each[2]) end
end
redis.call('SET', done, ARGV[3], 'EX', 86400)
return {1, lineage, last}
"""
)

VIEW: Final = Script(
    _COMMON
    + """
-- ARGV: p, topic, token, ms of an idle epoch, and of one in which nothing was published, runs and bytes of a piece.
-- The first piece of what is kept comes with it.
local topic, idle = ARGV[2], tonumber(ARGV[4])
local lineage, last = state(ARGV[3])
local ms = now()
local epoch, top, size, ttl, touched, lives = epoch_of(topic, lineage)
local m = p .. ':m:' .. topic
if top == 0 then
  redis.call('HSET', m, 'e', epoch, 't', 0, 's', 0, 'l', 0, 'x', 0, 'y', 0)
  redis.call('PEXPIRE', m, ARGV[5])
elseif touched + math.max(idle, ttl) / 8 < ms then
  redis.call('HSET', m, 'e', epoch, 't', text(top), 's', text(size), 'l', text(ttl), 'x', text(ms), 'y', text(lives))
  redis.call('PEXPIRE', m, text(math.max(idle, ttl) * 1.25 + 1000))
end
local runs = {}
if size > 0 then runs = piece(topic, math.max(0, top - size + 1), top, tonumber(ARGV[6]), tonumber(ARGV[7])) end
return {last, text(ms), epoch, text(top), text(size), text(ttl), runs}
"""
)

PIECE: Final = Script(
    _COMMON
    + """
-- ARGV: p, topic, epoch, the offset to begin with, the top of the view, runs and bytes of a piece. Nothing of
-- another epoch: what is there now may have the same offsets.
local m = redis.pcall('HGET', p .. ':m:' .. ARGV[2], 'e')
if m ~= ARGV[3] then return false end
return piece(ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]))
"""
)

TOUCH: Final = Script(
    """
-- ARGV: p, ms, then topics in which nothing was published, and to which somebody listens.
for i = 3, #ARGV do redis.call('PEXPIRE', ARGV[1] .. ':m:' .. ARGV[i], ARGV[2]) end
return 1
"""
)

ATTACH: Final = Script(
    _COMMON
    + """
-- ARGV: p, node, token, place or '' for the last entry.
-- Returns the lineage, the last entry, the one where the lineage began, the first one that is there, the head
-- of the one at the place, the last batch of this node, the format. What another program has put in place of the
-- streams of this node is taken away.
for _, key in ipairs({KEYS[1], p .. ':in:' .. ARGV[2]}) do
  local kind = redis.call('TYPE', key).ok
  if kind ~= 'stream' and kind ~= 'none' then redis.call('DEL', key) end
end
local lineage, last, began = state(ARGV[3])
local place = ARGV[4] == '' and text(last) or ARGV[4]
local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
local here = redis.call('XRANGE', KEYS[1], place .. '-0', place .. '-0')[1]
return {
  lineage, last, began, first and first[1] or '', here and here[2][2] or '',
  tonumber(redis.call('GET', p .. ':done:' .. ARGV[2]) or '0'),
  tonumber(redis.call('HGET', p .. ':state', 'v')),
}
"""
)

RENEW: Final = Script(
    _COMMON
    + """
-- ARGV: p, the lineage that was cut, the next one. Whoever is first begins it.
if redis.call('HGET', p .. ':state', 'l') == ARGV[2] then
  redis.call('HSET', p .. ':state', 'l', ARGV[3], 'r', redis.call('HGET', p .. ':state', 'b'))
end
return {redis.call('HGET', p .. ':state', 'l'), tonumber(redis.call('HGET', p .. ':state', 'r'))}
"""
)

BEAT: Final = Script(
    _COMMON
    + """
-- ARGV: p, node, token, ms of a lease, whether others may be declared dead, where its inbox is read, bytes of the
-- log. Returns the last entry, and the dead that are this node's to bury; nothing for one that is dead itself.
local node, lease = ARGV[2], tonumber(ARGV[4])
local lineage, last = state(ARGV[3])
local nodes, dead = p .. ':nodes', p .. ':dead'
if redis.call('HEXISTS', nodes, node) == 0 then return {} end
local ms = now()
-- A beat of its own that is as old, or yet to come: the clock was set. Then each has a whole lease from now on.
local own = tonumber(redis.call('HGET', nodes, node))
local is_set = not own or own + lease <= ms or own > ms
redis.call('HSET', nodes, node, text(ms))
redis.call('XTRIM', p .. ':in:' .. node, 'MINID', '~', ARGV[6])
if ARGV[5] == '1' then
  local beats = redis.call('HGETALL', nodes)
  local fields, bytes = {'', ''}, 0
  for i = 1, #beats, 2 do
    local other, beat = beats[i], tonumber(beats[i + 1])
    if is_set or beat > ms then
      redis.call('HSET', nodes, other, text(ms))
    elseif beat + lease <= ms then
      redis.call('HDEL', nodes, other)
      redis.call('HSET', dead, other, node)
      redis.call('SET', p .. ':was:' .. other, node, 'EX', 604800)
      redis.call('UNLINK', p .. ':n:' .. other, p .. ':in:' .. other)
      local header = table.concat({'G', #fields / 2 - 1, 0, '-', 0, 0, other}, ' ')
      fields[#fields + 1], fields[#fields + 2] = header, ''
      bytes = bytes + #header
    end
  end
  if #fields > 2 then last = enter('-', 0, last, lineage, ms, fields, bytes, ARGV[7]) end
end
local mine, left = {text(last)}, redis.call('HGETALL', dead)
for i = 1, #left, 2 do
  if left[i + 1] ~= node and redis.call('HEXISTS', nodes, left[i + 1]) == 0 and ARGV[5] == '1' then
    redis.call('HSET', dead, left[i], node)
    left[i + 1] = node
  end
  if left[i + 1] == node then mine[#mine + 1] = left[i] end
end
return mine
"""
)

ENTER: Final = Script(
    _COMMON
    + """
-- ARGV: p, node, token, the lineage in which it was entered before, '' for a new one.
-- Returns 0 for a node that is dead; else the lineage, and for each node that lives its id and its notices.
local node = ARGV[2]
local lineage = state(ARGV[3])
local nodes = p .. ':nodes'
if redis.call('HEXISTS', nodes, node) == 0 and (ARGV[4] == lineage or redis.call('EXISTS', p .. ':was:' .. node) == 1) then
  return {'0'}
end
redis.call('HSET', nodes, node, text(now()))
local found = {lineage}
for _, other in ipairs(redis.call('HKEYS', nodes)) do
  found[#found + 1] = other
  found[#found + 1] = redis.call('HGETALL', p .. ':n:' .. other)
end
return found
"""
)

LEAVE: Final = Script(
    _COMMON
    + """
-- ARGV: p, node, token, bytes of the log. Cards that are left are another node's to deal with.
local node = ARGV[2]
local lineage, last = state(ARGV[3])
if redis.call('HDEL', p .. ':nodes', node) == 0 then return 0 end
redis.call('UNLINK', p .. ':n:' .. node, p .. ':in:' .. node, p .. ':done:' .. node)
if redis.call('EXISTS', p .. ':d:' .. node) == 1 then redis.call('HSET', p .. ':dead', node, '') end
redis.call('SET', p .. ':was:' .. node, node, 'EX', 604800)
local header = table.concat({'G', 0, 0, '-', 0, 0, node}, ' ')
enter('-', 0, last, lineage, now(), {'', '', header, ''}, #header, ARGV[4])
return 1
"""
)

READ: Final = Script(
    _COMMON
    + """
-- ARGV: p, drawer, the most cards. Returns -1 for more, else names and values.
local drawer, count = ARGV[2], 0
local nodes = living(drawer)
for _, node in ipairs(nodes) do
  local size = redis.pcall('HLEN', p .. ':c:' .. node .. ':' .. drawer)
  count = count + (tonumber(size) or 0)
end
if count > tonumber(ARGV[3]) then return -1 end
local found = {}
for i, node in ipairs(nodes) do found[i] = ours('HGETALL', p .. ':c:' .. node .. ':' .. drawer) end
return found
"""
)

OWNERS: Final = Script(
    _COMMON
    + """
-- ARGV: p, drawer, the node to go on with, '' for the first, the cursor in its cards, about how many cards.
-- Returns where to go on, the node '' when all were seen; then node, name and owner of each card, some of them more
-- than once. What is no card of ours is none.
local drawer, most, nodes = ARGV[2], tonumber(ARGV[5]), living(ARGV[2])
local found, cursor, seen = {'', '0'}, ARGV[4], 0
table.sort(nodes)
for _, node in ipairs(nodes) do
  if node > ARGV[3] then cursor = '0' end
  if node >= ARGV[3] then
    repeat
      if seen >= most then
        found[1], found[2] = node, cursor
        return found
      end
      local page = ours('HSCAN', p .. ':c:' .. node .. ':' .. drawer, cursor, 'COUNT', most)
      cursor = page[1] or '0'
      for i = 1, #(page[2] or {}), 2 do
        local value = page[2][i + 1]
        local size, first = string.match(value, '^(%d+):()')
        size, seen = tonumber(size), seen + 1
        if size and size <= #value - first + 1 then
          found[#found + 1], found[#found + 2] = node, page[2][i]
          found[#found + 1] = string.sub(value, first, first + size - 1)
        end
      end
    until cursor == '0'
  end
end
return found
"""
)

LEASE: Final = Script(
    _COMMON
    + """
-- ARGV: p, count, above. Returns the last number.
local last = math.max(tonumber(redis.call('GET', p .. ':fd') or '0'), tonumber(ARGV[3])) + tonumber(ARGV[2])
redis.call('SET', p .. ':fd', text(last))
return text(last)
"""
)

LEFTOVERS: Final = Script(
    _COMMON
    + """
-- ARGV: p, node, about how many. Returns drawer, name, value of each; none when nothing is left of the node.
local node, most, found = ARGV[2], tonumber(ARGV[3]), {}
local drawers = ours('SRANDMEMBER', p .. ':d:' .. node, most)
while #drawers > 0 do
  for _, drawer in ipairs(drawers) do
    local cursor, before = '0', #found
    repeat
      local page = ours('HSCAN', p .. ':c:' .. node .. ':' .. drawer, cursor, 'COUNT', most)
      cursor = page[1] or '0'
      for i = 1, #(page[2] or {}), 2 do
        found[#found + 1], found[#found + 2], found[#found + 3] = drawer, page[2][i], page[2][i + 1]
      end
    until cursor == '0' or #found >= 3 * most
    if #found == before then redis.call('SREM', p .. ':d:' .. node, drawer) end  -- else it comes up again
    if #found >= 3 * most then return found end
  end
  if #found > 0 then return found end
  drawers = ours('SRANDMEMBER', p .. ':d:' .. node, most)
end
redis.call('HDEL', p .. ':dead', node)
return found
"""
)

CLEAR: Final = Script(
    _COMMON
    + """
-- ARGV: p, node, then drawer and name of each card.
for i = 3, #ARGV, 2 do take_out(ARGV[2], ARGV[i], ARGV[i + 1]) end
if redis.call('EXISTS', p .. ':d:' .. ARGV[2]) == 0 then redis.call('HDEL', p .. ':dead', ARGV[2]) end
return 1
"""
)
