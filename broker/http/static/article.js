// The tutorial's client: open, say hello, show the answer, close five seconds later.
"use strict";

(() => {
  // The page and the broker are at one place, which a proxy may have put below a path of its own.
  const address = new URL(".", location.href).href.replace(/^http/, "ws").replace(/\/$/, "");
  const run = document.getElementById("run");
  const log = document.getElementById("log");
  document.getElementById("address").textContent = address;

  function print(line) {
    console.log(line);
    const item = document.createElement("li");
    item.textContent = line;
    log.append(item);
  }

  run.addEventListener("click", () => {
    run.disabled = true;
    log.replaceChildren();
    const socket = new WebSocket(address);
    socket.onopen = () => {
      print("client：打开连接");
      socket.send("client：hello，服务端");
    };
    socket.onmessage = (event) => {
      print(`client：接收到服务端的消息 ${event.data}`);
      setTimeout(() => socket.close(), 5000);
    };
    socket.onclose = () => {
      print("client：关闭连接");
      run.disabled = false;
    };
  });
})();
