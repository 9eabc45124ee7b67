// What an unmodified Centrifuge client for JavaScript does with the broker.
// usage: node scenarios.mjs SCENARIO json|protobuf TRANSPORT WS-URL; exits 0 when it went as it should
import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import { EventSource } from "eventsource";
import WebSocket from "ws";

const [scenario, encoding, transport, url] = process.argv.slice(2);
const http = url.replace(/^ws/, "http");
const isProtobuf = encoding === "protobuf";
const { Centrifuge } = await import(isProtobuf ? "centrifuge/build/protobuf" : "centrifuge");

// In protobuf the app sees payloads as bytes.
const said = (value) => (isProtobuf ? new TextEncoder().encode(JSON.stringify(value)) : value);
const read = (data) => (isProtobuf ? JSON.parse(new TextDecoder().decode(data)) : data);

const PATIENCE = 30000;
const timer = setTimeout(() => {
  console.error(`${scenario}: still waiting after ${PATIENCE} ms`);
  process.exit(1);
}, PATIENCE);

/** The next event of this name that satisfies `wanted`. */
function next(emitter, name, wanted = () => true) {
  return new Promise((resolve) => {
    const listen = (context) => {
      if (!wanted(context)) return;
      emitter.removeListener(name, listen);
      resolve(context);
    };
    emitter.on(name, listen);
  });
}

/** Where a transport is reached, at other paths if need be. */
const endpoint = (name, path = `/connection/${name}`) => ({
  transport: name,
  endpoint: `${name === "websocket" ? url : http}${path}`,
});

/** A client that is connected; its fd is in `client.fd`, its transport in `client.transport`. */
async function connect(options = {}, endpoints = [endpoint(transport)]) {
  const client = new Centrifuge(endpoints, {
    websocket: WebSocket,
    eventsource: EventSource,
    emulationEndpoint: `${http}/emulation`,
    ...options,
  });
  const connected = next(client, "connected");
  client.connect();
  const context = await connected;
  client.fd = Number(context.client);
  client.transport = context.transport;
  assert.deepEqual(read(context.data), { fd: client.fd });
  return client;
}

async function subscribe(client, topic, options = {}) {
  const sub = client.newSubscription(topic, options);
  const subscribed = next(sub, "subscribed");
  sub.subscribe();
  await subscribed;
  return sub;
}

/** A token that expires in a second, as a backend would mint it. */
function token(claims) {
  const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
  const exp = Math.floor(Date.now() / 1000) + 1;
  const signed = `${part({ alg: "HS256" })}.${part({ exp, ...claims })}`;
  const secret = process.env.BROKER_TOKENS_HMAC_SECRET;
  return `${signed}.${createHmac("sha256", secret).update(signed).digest("base64url")}`;
}

const data = ({ publications }) => publications.map((publication) => read(publication.data));

const scenarios = {
  async messages() {
    const [alice, bob] = [await connect(), await connect()];
    const [a, b] = [await subscribe(alice, "room.lobby"), await subscribe(bob, "room.lobby")];
    const arrived = Promise.all([next(a, "publication"), next(b, "publication")]);
    await a.publish(said({ text: "你好" }));
    for (const publication of await arrived) {
      assert.deepEqual(read(publication.data), { text: "你好" });
      assert.equal(publication.info.client, String(alice.fd));
    }
    a.unsubscribe();
    let heard = false;
    a.on("publication", () => (heard = true));
    const last = next(b, "publication");
    await b.publish(said("only bob"));
    await last;
    await alice.publish("elsewhere", said(1)); // a round trip: nothing is on its way any more
    assert.ok(!heard);
  },

  async history() {
    const sub = await subscribe(await connect(), "news");
    for (const n of [1, 2, 3]) await sub.publish(said(n));
    const all = await sub.history({ limit: 100 });
    assert.deepEqual(data(all), [1, 2, 3]);
    assert.equal(all.offset, 3);
    assert.deepEqual(data(await sub.history({ limit: 2, reverse: true })), [3, 2]);
    const since = { offset: 1, epoch: all.epoch };
    assert.deepEqual(data(await sub.history({ limit: 100, since })), [2, 3]);
    assert.deepEqual(data(await sub.history({ limit: 0 })), []);
  },

  async presence() {
    const [alice, bob] = [await connect(), await connect()];
    const a = await subscribe(alice, "room.lobby", { joinLeave: true });
    const joined = next(a, "join", ({ info }) => info.client !== String(alice.fd));
    const b = await subscribe(bob, "room.lobby");
    assert.equal((await joined).info.client, String(bob.fd));
    const { clients } = await a.presence();
    assert.deepEqual(Object.keys(clients).sort(), [alice.fd, bob.fd].map(String).sort());
    assert.equal((await a.presenceStats()).numClients, 2);
    const left = next(a, "leave");
    b.unsubscribe();
    assert.equal((await left).info.client, String(bob.fd));
    const leftAgain = next(a, "leave");
    b.subscribe();
    await next(a, "join");
    bob.disconnect();
    assert.equal((await leftAgain).info.client, String(bob.fd));
    assert.equal((await a.presenceStats()).numClients, 1);
  },

  async recovery() {
    const [alice, bob] = [await connect(), await connect()];
    const a = await subscribe(alice, "room.lobby", { recoverable: true });
    const seen = [];
    a.on("publication", ({ data }) => seen.push(read(data)));
    const first = next(a, "publication");
    await bob.publish("room.lobby", said(1));
    await first;
    alice.disconnect();
    for (const n of [2, 3, 4]) await bob.publish("room.lobby", said(n));
    const back = next(a, "subscribed");
    const caughtUp = next(a, "publication", ({ data }) => read(data) === 4);
    alice.connect();
    const context = await back;
    assert.ok(context.wasRecovering && context.recovered);
    await caughtUp;
    const live = next(a, "publication", ({ data }) => read(data) === 5);
    await bob.publish("room.lobby", said(5));
    await live;
    assert.deepEqual(seen, [1, 2, 3, 4, 5]);
  },

  async lost() {
    const [alice, bob] = [await connect(), await connect()];
    const a = await subscribe(alice, "room.lobby", { recoverable: true });
    alice.disconnect();
    for (let n = 0; n < 105; n++) await bob.publish("room.lobby", said(n)); // history keeps 100
    const back = next(a, "subscribed");
    alice.connect();
    const context = await back;
    assert.ok(context.wasRecovering && !context.recovered);
  },

  async direct() {
    const [alice, bob] = [await connect(), await connect()];
    const topic = `fd:${bob.fd}`;
    const arrived = next(bob, "publication", ({ channel }) => channel === topic);
    await alice.publish(topic, said({ text: "only you" }));
    const publication = await arrived;
    assert.deepEqual(read(publication.data), { text: "only you" });
    assert.equal(publication.info.client, String(alice.fd));
    await assert.rejects(alice.publish("fd:999999", said(1)), { code: 102 });
    const sub = alice.newSubscription(topic);
    const refused = next(sub, "unsubscribed");
    sub.subscribe();
    assert.equal((await refused).code, 103);
  },

  async patterns() {
    const [alice, bob] = [await connect(), await connect()];
    const one = await subscribe(alice, "news.*");
    const rest = await subscribe(alice, "news.>");
    const arrived = Promise.all([next(one, "publication"), next(rest, "publication")]);
    await bob.publish("news.sport", said("goal"));
    for (const publication of await arrived) {
      assert.equal(read(publication.data), "goal"); // this SDK does not tell which topic it came on
    }
    const deep = next(rest, "publication");
    one.on("publication", () => assert.fail("* is one token"));
    await bob.publish("news.sport.football", said("deep"));
    assert.equal(read((await deep).data), "deep");
  },

  async rpc() {
    const [alice, bob] = [await connect(), await connect()];
    await assert.rejects(alice.rpc("nothing", said({})), { code: 104 });
    const sub = await subscribe(bob, "room.lobby");
    const arrived = next(sub, "publication");
    const request = { topic: "room.lobby", data: { text: "hi" }, report: true };
    const { data: report } = await alice.rpc("publish", said(request));
    assert.equal(read(report).matched, 1);
    assert.deepEqual(read((await arrived).data), { text: "hi" });
  },

  async tokenRefresh() {
    let asked = 0;
    const client = await connect({ getToken: async () => (asked++, token({ sub: "alice" })) });
    client.on("connecting", () => assert.fail("it lost its connection"));
    while (asked < 3) await new Promise((resolve) => setTimeout(resolve, 50));
    await client.publish("room.lobby", said(1));
  },

  async tokenSubRefresh() {
    const client = await connect({ token: token({ sub: "alice", exp: 4e9 }) });
    let asked = 0;
    const getToken = async ({ channel }) => (asked++, token({ sub: "alice", channel }));
    const sub = await subscribe(client, "$secret", { getToken });
    sub.on("unsubscribed", () => assert.fail("it lost its subscription"));
    while (asked < 3) await new Promise((resolve) => setTimeout(resolve, 50));
    const arrived = next(sub, "publication");
    await sub.publish(said(1));
    await arrived;
  },

  async fallback() {
    const blocked = (name) => endpoint(name, "/nothing");
    const [web, stream, sse] = ["websocket", "http_stream", "sse"].map((name) => endpoint(name));
    const second = await connect({}, [blocked("websocket"), stream, sse]);
    assert.equal(second.transport, "http_stream");
    const third = await connect({}, [blocked("websocket"), blocked("http_stream"), sse]);
    assert.equal(third.transport, "sse");
    assert.equal((await connect({}, [web, stream, sse])).transport, "websocket");
    const arrived = next(third, "publication", ({ channel }) => channel === `fd:${third.fd}`);
    await second.publish(`fd:${third.fd}`, "over HTTP");
    assert.equal((await arrived).data, "over HTTP");
  },

  async lostSession() {
    const client = await connect();
    assert.equal(client.transport, transport);
    const before = client.fd;
    client._session = "999.nobody"; // as after a restart of the broker that nobody told it of
    const back = next(client, "connected");
    await client.publish("room.lobby", said(1)).catch(() => {});
    if (transport === "websocket") return;
    assert.ok(Number((await back).client) > before);
    await client.publish("room.lobby", said(2));
  },
};

await scenarios[scenario]();
clearTimeout(timer);
process.exit(0);
