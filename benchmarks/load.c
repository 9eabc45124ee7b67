/* A load generator for WebSocket servers: one thread, epoll, no parsing per message.
 *
 * It knows no protocol. The harness says what a subscriber and a publisher send after the handshake
 * (`--sub-hello`, `--pub-hello`), which text shows that they are ready, and what stands before and
 * behind a payload. Each payload holds one marker "#@" and the time it was made, so counting
 * deliveries is the same work for every server: a memchr over what was read.
 *
 * In all texts `%T` becomes the number of the topic of that connection and `%I` its own number.
 *
 * Saturated (`--rate 0`) it keeps `--window` publications under way per publisher, counted by what
 * the subscribers got: a server is driven as fast as it delivers, and no faster. Paced, it publishes
 * `--rate` times a second in total and keeps every latency.
 *
 * Prints one JSON object. Build: cc -O2 -o load load.c
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define READ_SIZE (256 * 1024)
#define MARKER "#@"
#define STAMP 16 /* hex digits of the nanosecond clock behind the marker */
#define MOST_SAMPLES 4000000

enum phase { UPGRADING, GREETING, READY };

struct peer {
    int fd, index, topic;
    char publishes;
    enum phase phase;
    char *out; /* what a full socket did not take */
    size_t out_len, out_cap;
    int wants_write;
    char tail[STAMP + 4]; /* the end of the last read: a marker may lie across two */
    int tail_len;
    char *greeting; /* what came before it was ready */
    size_t greeting_len;
    uint64_t sent, owed; /* publications made, and allowed by the window */
};

static const char *host = "127.0.0.1", *path = "/", *sub_hello = "", *pub_hello = "";
static const char *sub_ready = "", *pub_ready = "", *prefix = "", *suffix = "", *upgrade_extra = "";
static int port, subs = 1, pubs = 1, topics = 1, payload = 64, opcode = 1, window = 256;
static double seconds = 3, warm = 0.5, rate = 0;
static struct peer *peers;
static int poll_fd, lost = 0, ready_count = 0;
static uint64_t received = 0, published = 0, bytes_in = 0;
static uint64_t *samples, sample_count = 0;
static int measuring = 0;
static char buffer[READ_SIZE + 64];

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static double cpu_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return u.ru_utime.tv_sec + u.ru_stime.tv_sec + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* Copy a text, with %T, %I and \n put in. */
static size_t expand(char *to, const char *from, struct peer *p) {
    char *start = to;
    for (; *from; from++) {
        if (from[0] == '%' && from[1] == 'T') to += sprintf(to, "%d", p->topic), from++;
        else if (from[0] == '%' && from[1] == 'I') to += sprintf(to, "%d", p->index), from++;
        else if (from[0] == '\\' && from[1] == 'n') *to++ = '\n', from++;
        else if (from[0] == '\\' && from[1] == 'r') *to++ = '\r', from++;
        else *to++ = *from;
    }
    *to = 0;
    return to - start;
}

/* A masked frame; the mask is zero, which is legal and leaves the payload as it is. */
static size_t put_frame(char *to, const char *data, size_t len) {
    size_t n = 0;
    to[n++] = (char)(0x80 | opcode);
    if (len < 126) to[n++] = (char)(0x80 | len);
    else if (len < 65536) {
        to[n++] = (char)(0x80 | 126);
        to[n++] = (char)(len >> 8);
        to[n++] = (char)len;
    } else {
        to[n++] = (char)(0x80 | 127);
        for (int i = 7; i >= 0; i--) to[n++] = (char)((uint64_t)len >> (8 * i));
    }
    memset(to + n, 0, 4);
    n += 4;
    memcpy(to + n, data, len);
    return n + len;
}

static void watch(struct peer *p, int write) {
    if (p->wants_write == write) return;
    struct epoll_event e = {.events = EPOLLIN | (write ? EPOLLOUT : 0), .data.ptr = p};
    epoll_ctl(poll_fd, EPOLL_CTL_MOD, p->fd, &e);
    p->wants_write = write;
}

static void gone(struct peer *p) {
    if (p->fd < 0) return;
    close(p->fd);
    p->fd = -1;
    lost++;
}

static void flush_out(struct peer *p) {
    if (p->fd < 0 || !p->out_len) return;
    ssize_t n = send(p->fd, p->out, p->out_len, MSG_NOSIGNAL);
    if (n < 0) {
        if (errno != EAGAIN) gone(p);
        else watch(p, 1);
        return;
    }
    memmove(p->out, p->out + n, p->out_len - n);
    p->out_len -= n;
    watch(p, p->out_len > 0);
}

static void queue(struct peer *p, const char *data, size_t len) {
    if (p->out_len + len > p->out_cap) {
        p->out_cap = (p->out_len + len) * 2;
        p->out = realloc(p->out, p->out_cap);
        if (!p->out) die("memory");
    }
    memcpy(p->out + p->out_len, data, len);
    p->out_len += len;
}

/* Queue `count` publications. The frame is made once per peer but for the time in it. */
static void publish(struct peer *p, uint64_t count) {
    static char *text, *frame;
    static size_t frame_len, stamp_at;
    static struct peer *made_for;
    if (made_for != p) {
        if (!text) text = malloc(payload + 4096), frame = malloc(payload + 4096);
        size_t n = expand(text, prefix, p);
        stamp_at = n + 2;
        memcpy(text + n, MARKER, 2);
        memset(text + n + 2, 'x', payload > 2 ? payload - 2 : 0);
        n += payload;
        n += expand(text + n, suffix, p);
        frame_len = put_frame(frame, text, n);
        stamp_at += frame_len - n;
        made_for = p;
    }
    char stamp[STAMP + 1];
    sprintf(stamp, "%016llx", (unsigned long long)now_ns());
    if (payload >= STAMP + 2) memcpy(frame + stamp_at, stamp, STAMP);
    for (uint64_t i = 0; i < count; i++) queue(p, frame, frame_len);
    p->sent += count;
    published += count;
}

static void count_markers(struct peer *p, char *data, ssize_t len) {
    char *at = data, *end = data + len, *keep = end;
    while ((at = memchr(at, '#', end - at))) {
        if (end - at < STAMP + 2) {
            keep = at;
            break;
        }
        if (at[1] != '@') {
            at++;
            continue;
        }
        received++;
        if (measuring && rate > 0 && sample_count < MOST_SAMPLES) {
            char hex[STAMP + 1];
            memcpy(hex, at + 2, STAMP);
            hex[STAMP] = 0;
            samples[sample_count++] = now_ns() - strtoull(hex, 0, 16);
        }
        at += payload >= STAMP + 2 ? STAMP + 2 : 2;
    }
    p->tail_len = end - keep;
    memcpy(p->tail, keep, p->tail_len);
}

static void greet(struct peer *p, char *data, ssize_t len) {
    p->greeting = realloc(p->greeting, p->greeting_len + len + 1);
    memcpy(p->greeting + p->greeting_len, data, len);
    p->greeting_len += len;
    p->greeting[p->greeting_len] = 0;
    if (p->phase == UPGRADING) {
        if (!memmem(p->greeting, p->greeting_len, "\r\n\r\n", 4)) return;
        if (!memmem(p->greeting, p->greeting_len, " 101 ", 5)) {
            fprintf(stderr, "load: refused: %.200s\n", p->greeting);
            exit(1);
        }
        p->phase = GREETING;
        const char *hello = p->publishes ? pub_hello : sub_hello;
        if (*hello) {
            char text[4096], frame[4200];
            char *copy = strdup(hello), *save, *part;
            /* several frames are separated by | */
            for (part = strtok_r(copy, "|", &save); part; part = strtok_r(0, "|", &save))
                queue(p, frame, put_frame(frame, text, expand(text, part, p)));
            free(copy);
            flush_out(p);
        }
    }
    const char *token = p->publishes ? pub_ready : sub_ready;
    if (!*token || memmem(p->greeting, p->greeting_len, token, strlen(token))) {
        p->phase = READY;
        ready_count++;
        free(p->greeting);
        p->greeting = 0;
    }
}

static void read_from(struct peer *p) {
    if (p->fd < 0) return;
    if (p->tail_len) memcpy(buffer, p->tail, p->tail_len);
    ssize_t n = recv(p->fd, buffer + p->tail_len, READ_SIZE, 0);
    if (n <= 0) {
        if (n == 0 || errno != EAGAIN) gone(p);
        return;
    }
    bytes_in += n;
    if (p->phase != READY) greet(p, buffer, n);
    else count_markers(p, buffer, n + p->tail_len);
}

static void turn(int wait_ms) {
    struct epoll_event events[256];
    int n = epoll_wait(poll_fd, events, 256, wait_ms);
    for (int i = 0; i < n; i++) {
        struct peer *p = events[i].data.ptr;
        if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read_from(p);
        if (p->fd >= 0 && events[i].events & EPOLLOUT) flush_out(p);
    }
}

static void open_peer(struct peer *p) {
    p->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (p->fd < 0) die("socket");
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, host, &to.sin_addr);
    if (connect(p->fd, (struct sockaddr *)&to, sizeof to)) die("connect");
    int one = 1;
    setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(p->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = p};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, p->fd, &e);
    char where[256], head[1024];
    expand(where, path, p);
    int n = snprintf(head, sizeof head,
                     "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%s\r\n",
                     where, host, port, upgrade_extra);
    queue(p, head, n);
    flush_out(p);
}

static int compare(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static double percentile(double q) {
    return sample_count ? samples[(uint64_t)(q * (sample_count - 1))] / 1e6 : 0;
}

int main(int argc, char **argv) {
    for (int i = 1; i + 1 < argc; i += 2) {
        char *name = argv[i], *value = argv[i + 1];
#define TEXT(option, variable) if (!strcmp(name, option)) { variable = value; continue; }
#define INT(option, variable) if (!strcmp(name, option)) { variable = atoi(value); continue; }
#define REAL(option, variable) if (!strcmp(name, option)) { variable = atof(value); continue; }
        TEXT("--host", host) INT("--port", port) TEXT("--path", path)
        INT("--subs", subs) INT("--pubs", pubs) INT("--topics", topics)
        INT("--payload", payload) INT("--opcode", opcode) INT("--window", window)
        REAL("--seconds", seconds) REAL("--warm", warm) REAL("--rate", rate)
        TEXT("--sub-hello", sub_hello) TEXT("--pub-hello", pub_hello)
        TEXT("--sub-ready", sub_ready) TEXT("--pub-ready", pub_ready)
        TEXT("--prefix", prefix) TEXT("--suffix", suffix) TEXT("--upgrade", upgrade_extra)
        fprintf(stderr, "load: unknown option %s\n", name);
        return 2;
    }
    struct rlimit files = {0};
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    samples = malloc(MOST_SAMPLES * sizeof *samples);
    poll_fd = epoll_create1(0);
    int all = subs + pubs;
    peers = calloc(all, sizeof *peers);
    uint64_t connect_start = now_ns();
    for (int i = 0; i < all; i++) {
        struct peer *p = &peers[i];
        p->publishes = i >= subs;
        p->index = i;
        p->topic = (p->publishes ? i - subs : i) % topics;
        open_peer(p);
        while (i + 1 - ready_count > 64) {
            turn(1000);
            if (now_ns() - connect_start > 60000000000u) die("peers do not get ready");
        }
    }
    while (ready_count < all && !lost) {
        turn(1000);
        if (now_ns() - connect_start > 60000000000u) die("peers do not get ready");
    }
    double connect_seconds = (now_ns() - connect_start) / 1e9;
    struct peer *publishers = peers + subs;
    double fan = (double)subs / topics; /* subscribers of one topic */
    uint64_t start = now_ns(), end = start + (uint64_t)((warm + seconds) * 1e9);
    uint64_t from = start + (uint64_t)(warm * 1e9), t = start, next = start;
    uint64_t received_before = 0, published_before = 0, bytes_before = 0;
    uint64_t delivered_base = received;
    double cpu_before = 0;
    int turn_of = 0;
    while ((t = now_ns()) < end && lost < all) {
        if (!measuring && t >= from) {
            measuring = 1;
            received_before = received, published_before = published, bytes_before = bytes_in;
            cpu_before = cpu_seconds();
        }
        if (!pubs) {
            turn(100);
            continue;
        }
        if (rate > 0) {
            while (next <= t) {
                struct peer *p = &publishers[turn_of++ % pubs];
                publish(p, 1);
                flush_out(p);
                next += (uint64_t)(1e9 / rate);
            }
            uint64_t left = next > t ? next - t : 0;
            turn(left > 1500000 ? 1 : 0);
            continue;
        }
        /* what has been delivered, told as publications, sets what may be under way */
        uint64_t done = (uint64_t)((received - delivered_base) / fan);
        uint64_t limit = done + (uint64_t)window * pubs;
        int sent_any = 0;
        for (int i = 0; i < pubs && published < limit; i++) {
            struct peer *p = &publishers[(turn_of + i) % pubs];
            if (p->fd < 0 || p->out_len > 65536) continue;
            uint64_t share = (limit - published + pubs - 1) / pubs;
            if (share > 512) share = 512;
            if (share < 16 && share < (uint64_t)window / 4) continue;
            publish(p, share);
            flush_out(p);
            sent_any = 1;
        }
        turn_of++;
        turn(sent_any ? 0 : 10);
    }
    double elapsed = (t - from) / 1e9;
    uint64_t got = received - received_before;
    qsort(samples, sample_count, sizeof *samples, compare);
    printf("{\"deliveries_per_second\": %.0f, \"publishes_per_second\": %.0f, \"megabytes_per_second\": %.1f, "
           "\"seconds\": %.3f, \"lost_connections\": %d, \"connects_per_second\": %.0f, "
           "\"load_cpu\": %.3f, \"samples\": %llu, \"p50_ms\": %.3f, \"p99_ms\": %.3f, \"p999_ms\": %.3f}\n",
           got / elapsed, (published - published_before) / elapsed, (bytes_in - bytes_before) / elapsed / 1e6,
           elapsed, lost, all / connect_seconds, (cpu_seconds() - cpu_before) / elapsed,
           (unsigned long long)sample_count, percentile(.5), percentile(.99), percentile(.999));
    return 0;
}
