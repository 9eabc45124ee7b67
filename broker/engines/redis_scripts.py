"""What Redis does for us in one step each, in Lua, and the names of the keys.

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
`d`   a repetition of a publish with a key: it is not published again
`R`   what the topic keeps is removed
`F`   the topic is forgotten, with its epoch
====  ==============================================================================================

An epoch begins with the lineage, so all of them change with it. Numbers are written by `%.0f`: Lua would
round them at 14 digits.
"""

from typing import Final

from broker.engines.redis_link import Script

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
-- The epoch of a topic; a new one where it has none of this lineage.
local function epoch_of(topic, lineage)
  local m = redis.call('HMGET', p .. ':m:' .. topic, 'e', 't', 's', 'l', 'x', 'y')
  if m[1] and string.sub(m[1], 1, #lineage) == lineage then
    return m[1], tonumber(m[2]), tonumber(m[3]), tonumber(m[4]), tonumber(m[5]), tonumber(m[6])
  end
  local number = redis.call('HINCRBY', p .. ':state', 'c', 1)
  redis.call('DEL', p .. ':h:' .. topic)
  return lineage .. string.format('%x', number), 0, 0, 0, 0, 0
end
"""

APPEND: Final = Script(
    _COMMON
    + """
-- ARGV: p, node, counter, token, bytes of the log, ms of an idle epoch, bytes of retained values, then for
-- each run: flags, topic, size, ttl, count, key, data.
local node, counter = ARGV[2], tonumber(ARGV[3])
local lineage, last = state(ARGV[4])
local done = p .. ':done:' .. node
if counter <= tonumber(redis.call('GET', done) or '0') then return {0, lineage, last} end
local ms, idle = now(), tonumber(ARGV[6])
local fields = {'', table.concat({node, ARGV[3], text(last), lineage, text(ms)}, ' ')}
local bytes, number = #fields[2], 0

local function keep(topic, size, ttl, count, data)
  local epoch, top, _, _, touched, lives = epoch_of(topic, lineage)
  local m, h = p .. ':m:' .. topic, p .. ':h:' .. topic
  local first = top + 1
  top = top + count
  -- A key lives on a while, so that its end is not put off by each run.
  local touch = touched + math.max(idle, ttl) / 8 < ms
  if touch then touched = ms end
  local prolong = lives < ms + ttl
  if prolong then lives = ms + ttl + math.floor(ttl / 4) + 1000 end
  redis.call('HSET', m, 'e', epoch, 't', text(top), 's', size, 'l', text(ttl), 'x', text(touched), 'y', text(lives))
  if touch then redis.call('PEXPIRE', m, text(math.max(idle, ttl) * 1.25 + 1000)) end
  redis.call('XADD', h, 'MINID', '~', text(math.max(0, top - size + 1)) .. '-0', text(top) .. '-0', text(ms), data)
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
  while held > tonumber(ARGV[7]) do
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
  local once = p .. ':once:' .. key
  local before = key ~= '' and redis.call('GET', once)
  if before then
    first, epoch = string.match(before, '^(%d+) (.*)$')
    flags, data = 'd', ''
  else
    local kind = string.sub(flags, 1, 1)
    if kind == 'k' then
      first, epoch = keep(topic, size, ttl, tonumber(ARGV[i + 4]), data)
    elseif kind == 'e' or kind == 'F' then
      redis.call('DEL', p .. ':m:' .. topic, p .. ':h:' .. topic)
    elseif kind == 'R' then
      redis.call('DEL', p .. ':h:' .. topic)
    end
    first = text(first)
    local last_flag = string.sub(flags, 2)
    if last_flag ~= '' then
      local offset = kind == 'k' and text(first + tonumber(ARGV[i + 4]) - 1) or '0'
      retain(topic, offset .. ' ' .. data, last_flag == 'c')
    end
    if key ~= '' then redis.call('SET', once, first .. ' ' .. epoch, 'EX', 300) end
  end
  local header = table.concat({flags, number, first, epoch, ARGV[i + 2], ARGV[i + 3], topic}, ' ')
  fields[#fields + 1], fields[#fields + 2] = header, data
  bytes, number = bytes + #header + #data, number + 1
end
last = last + bytes
local id = text(last)
redis.call('XADD', KEYS[1], 'MINID', '~', text(math.max(0, last - tonumber(ARGV[5]))), id .. '-0', unpack(fields))
redis.call('HSET', p .. ':state', 'b', id)
redis.call('SET', done, ARGV[3], 'EX', 86400)
return {1, lineage, last}
"""
)

VIEW: Final = Script(
    _COMMON
    + """
-- ARGV: p, topic, token, ms of an idle epoch.
local topic, idle = ARGV[2], tonumber(ARGV[4])
local lineage, last = state(ARGV[3])
local ms = now()
local epoch, top, size, ttl, touched, lives = epoch_of(topic, lineage)
local m = p .. ':m:' .. topic
if touched + math.max(idle, ttl) / 8 < ms then
  redis.call('HSET', m, 'e', epoch, 't', text(top), 's', text(size), 'l', text(ttl), 'x', text(ms), 'y', text(lives))
  redis.call('PEXPIRE', m, text(math.max(idle, ttl) * 1.25 + 1000))
end
local runs = {}
if size > 0 then runs = redis.call('XRANGE', p .. ':h:' .. topic, text(math.max(0, top - size + 1)) .. '-0', '+') end
return {last, text(ms), epoch, text(top), text(size), text(ttl), runs}
"""
)

ATTACH: Final = Script(
    _COMMON
    + """
-- ARGV: p, node, token, place or '' for the last entry.
-- Returns the lineage, the last entry, the one where the lineage began, the first one that is there, the head
-- of the one at the place, the last batch of this node, the format.
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
