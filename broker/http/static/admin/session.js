// The line to the broker: its own protocol, at the door below this page. The key is shown once a connect, in
// its data; it stands in no address, and is kept for this tab alone.

const KEPT = "trio-broker.admin.key";
const DOOR = new URL(`${location.pathname.replace(/\/$/, "")}/websocket`, location.href.replace(/^http/, "ws"));

export class Session extends EventTarget {
  role = "";
  fd = 0;
  state = "disconnected";
  #client = null;

  get kept() { return sessionStorage.getItem(KEPT) || ""; }

  open(key) {
    this.#drop();
    const client = new Centrifuge(DOOR.href.split("#")[0], { data: { key }, name: "dashboard", timeout: 10000 });
    this.#client = client;
    client.on("connected", (context) => {
      sessionStorage.setItem(KEPT, key);
      ({ role: this.role, fd: this.fd } = context.data);
      this.#turn("connected");
    });
    client.on("connecting", (context) => this.#turn("connecting", context));
    client.on("disconnected", (context) => {
      if (context.code >= 3500 && context.code < 4000) sessionStorage.removeItem(KEPT);
      this.#turn("disconnected", context);
    });
    client.on("publication", (context) => {
      if (context.channel === "$admin") this.dispatchEvent(new CustomEvent("told", { detail: context.data }));
    });
    client.connect();
  }

  close() {
    sessionStorage.removeItem(KEPT);
    this.#drop();
    this.#turn("disconnected", { code: 0, reason: "" });
  }

  async call(method, data = {}) {
    if (this.state !== "connected") throw new Error("not connected");
    return (await this.#client.rpc(`admin.${method}`, data)).data;
  }

  #drop() {
    this.#client?.removeAllListeners();
    this.#client?.disconnect();
    this.#client = null;
  }

  #turn(state, context = {}) {
    this.state = state;
    this.dispatchEvent(new CustomEvent("turned", { detail: { state, ...context } }));
  }
}
