/* The ceiling: what this machine and the load generator can do with a server that does nothing.
 *
 * What comes from a publisher at /pub/TOPIC goes to all subscribers at /sub/TOPIC: unmasked, one
 * frame made per message, all frames of a read in one write to each. No checks, no bounds, no
 * other frames than short data frames: not a server anybody could use.
 *
 * Build: cc -O2 -o relay relay.c; run: ./relay PORT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define SIZE (256 * 1024)
#define MOST 20000

struct peer {
    int fd, topic, is_publisher, have;
    char *in;
};

static struct peer *peer_of[MOST];
static int *subscribers[MOST], count_of[MOST], poll_fd;
static char out[2 * SIZE];

static void leave(struct peer *p) {
    for (int i = 0; i < count_of[p->topic]; i++)
        if (subscribers[p->topic][i] == p->fd) {
            subscribers[p->topic][i] = subscribers[p->topic][--count_of[p->topic]];
            break;
        }
    peer_of[p->fd] = 0;
    close(p->fd);
    free(p->in);
    free(p);
}

static void send_all(int fd, const char *data, size_t len) {
    while (len) {
        ssize_t n = send(fd, data, len, MSG_NOSIGNAL);
        if (n < 0) {
            struct pollfd full = {.fd = fd, .events = POLLOUT};
            if (errno != EAGAIN || poll(&full, 1, 1000) != 1) return;
            continue;
        }
        data += n;
        len -= n;
    }
}

static void greet(struct peer *p) {
    char *end = memmem(p->in, p->have, "\r\n\r\n", 4);
    if (!end) return;
    p->is_publisher = !memcmp(p->in, "GET /pub/", 9);
    p->topic = atoi(p->in + 9);
    static const char reply[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                                "Connection: Upgrade\r\n"
                                "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    send_all(p->fd, reply, sizeof reply - 1);
    if (!p->is_publisher) {
        int **list = &subscribers[p->topic];
        *list = realloc(*list, (count_of[p->topic] + 1) * sizeof **list);
        (*list)[count_of[p->topic]++] = p->fd;
    }
    p->have = 0;
    free(p->in);
    p->in = p->is_publisher ? malloc(SIZE) : malloc(1);
}

static void relay(struct peer *p) {
    unsigned char *at = (unsigned char *)p->in, *end = at + p->have;
    size_t made = 0;
    while (end - at >= 8) {
        size_t len = at[1] & 127, head = 2;
        if (len == 126) len = at[2] << 8 | at[3], head = 4;
        if ((size_t)(end - at) < head + 4 + len) break;
        memcpy(out + made, at, head);
        out[made + 1] &= 127;
        unsigned char *mask = at + head, *body = at + head + 4;
        for (size_t i = 0; i < len; i++) out[made + head + i] = body[i] ^ mask[i & 3];
        made += head + len;
        at = body + len;
    }
    p->have = end - at;
    memmove(p->in, at, p->have);
    for (int i = 0; made && i < count_of[p->topic]; i++) send_all(subscribers[p->topic][i], out, made);
}

int main(int argc, char **argv) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0)};
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 4096)) {
        perror("relay");
        return 1;
    }
    poll_fd = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener}, events[256];
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, listener, &e);
    for (;;) {
        int n = epoll_wait(poll_fd, events, 256, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                fd = accept4(listener, 0, 0, SOCK_NONBLOCK);
                if (fd < 0 || fd >= MOST) continue;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                peer_of[fd] = calloc(1, sizeof(struct peer));
                peer_of[fd]->fd = fd;
                peer_of[fd]->in = malloc(4096);
                peer_of[fd]->topic = MOST - 1;
                e.data.fd = fd;
                epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &e);
                continue;
            }
            struct peer *p = peer_of[fd];
            if (!p) continue;
            int ready = p->topic != MOST - 1, room = !ready ? 4096 : p->is_publisher ? SIZE : 1;
            ssize_t got = recv(fd, p->in + (room > 1 ? p->have : 0), room - (room > 1 ? p->have : 0), 0);
            if (got <= 0) {
                leave(p);
                continue;
            }
            p->have += got;
            if (!ready) greet(p);
            else if (p->is_publisher) relay(p);
            else p->have = 0;
        }
    }
}
