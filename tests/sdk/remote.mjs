// A Centrifuge client for JavaScript that a test tells what to do: a line of JSON in, a line of JSON out.
// usage: node remote.mjs WS-URL TOKEN; {"id", "do", ...} is answered with {"id", "result"} or {"id", "error"},
// and what happens to the client is told as {"event", ...}. It ends with its input.
import { createInterface } from "node:readline";
import WebSocket from "ws";
import { Centrifuge } from "centrifuge";

const [url, token] = process.argv.slice(2);
const client = new Centrifuge(url, { websocket: WebSocket, token, minReconnectDelay: 50 });
const tell = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);

/** What was published, as the test is told; a request is answered as well. */
function published(topic, { data, tags, info }) {
  tell({ event: "publication", topic, data, sender: info?.client, retained: Boolean(tags?.retained) });
  const reply_to = tags?.reply_to;
  if (reply_to) client.rpc("reply", { reply_to, data: { twice: 2 * data } });
}

client.on("connected", (context) => tell({ event: "connected", fd: Number(context.client) }));
client.on("connecting", ({ code }) => tell({ event: "connecting", code }));
client.on("publication", (context) => published(context.channel, context));

const actions = {
  connect: () =>
    new Promise((resolve) => {
      client.once("connected", (context) => resolve(Number(context.client)));
      client.connect();
    }),
  subscribe: ({ topic, options }) =>
    new Promise((resolve, reject) => {
      const sub = client.newSubscription(topic, options);
      sub.on("publication", (context) => published(topic, context));
      for (const event of ["join", "leave"]) {
        sub.on(event, ({ info }) => tell({ event, topic, sender: info.client }));
      }
      sub.on("subscribed", ({ wasRecovering, recovered }) => {
        tell({ event: "subscribed", topic, wasRecovering, recovered });
        resolve({});
      });
      sub.on("unsubscribed", ({ code, reason }) => reject({ code, message: reason }));
      sub.subscribe();
    }),
  publish: ({ topic, data }) => client.publish(topic, data),
  rpc: ({ method, params }) => client.rpc(method, params).then(({ data }) => data),
  presence: ({ topic }) => client.presence(topic).then(({ clients }) => Object.keys(clients)),
  history: ({ topic }) =>
    client
      .history(topic, { limit: 100 })
      .then(({ publications }) => publications.map(({ data }) => data)),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { id, do: name, ...options } = JSON.parse(line);
  Promise.resolve(actions[name](options)).then(
    (result) => tell({ id, result: result ?? null }),
    ({ code, message }) => tell({ id, error: { code, message } }),
  );
}
process.exit(0);
