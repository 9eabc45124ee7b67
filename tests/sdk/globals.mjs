// What browsers have and Node lacks before version 22: from npm, where it is not built in.
import { webcrypto } from "node:crypto";

globalThis.crypto ??= webcrypto;
if (!globalThis.WebSocket) globalThis.WebSocket = (await import("ws")).default;
