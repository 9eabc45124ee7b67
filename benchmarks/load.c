/* A load generator for WebSocket servers: one thread, epoll, nothing parsed per message.
 *
 * It knows no protocol. Its caller says what a subscriber and a publisher send after the handshake,
 * which text shows that they are ready, and what stands before and behind a payload. Each payload
 * begins with the marker "#@", so counting deliveries is the same work for every server: one memchr
 * to the next marker, one jump over the payload behind it.
 *
 * Rules:
 *
 * 1. Every server sees the same writes. A publisher hands `--burst` frames to one send(), one frame
 *    per message; frames are masked with a random key, as a client's must be.
 * 2. Saturated (`--rate 0`), at most `--window` publications per topic are under way, counted by
 *    what that topic's subscribers got. A server is driven as fast as it delivers, and no faster, so
 *    none is measured while it cuts slow readers.
 * 3. Paced, latency is counted from when a publication was due, not from when it was sent: a
 *    generator or a server that falls behind does not hide it.
 * 4. What limits the figure is told: the CPU of this process, of the server and of everybody else.
 *
 * With `--http PATH` the publishers POST instead, each on a connection that it keeps, one request under
 * way on each: `--batch` publications a request, each with what stands before and behind a payload,
 * with `--batch-between` between them and `--batch-open` and `--batch-close` around them. They count
 * as published when the answer has come, and only an answer with a status of 2xx counts.
 *
 * With no publishers it measures connections: how fast they are made, what each costs the server in
 * memory, and, once all are closed, how long until the server has noticed.
 *
 * In all texts `%T` is the number of the connection's topic, `%I` its own number, `%N` the number of
 * a filling subscription, `%F` what followed `--fd-token` in the greeting of the subscriber with the
 * same number; `|` parts frames, `\n` and `\r` stand for themselves.
 *
 * With `--tls 1` all of this is over TLS, whosever certificate the server shows. Built without OpenSSL
 * (`-DTLS`, `-lssl -lcrypto`) it refuses to.
 *
 * With `--frames 1` it counts frames instead of markers, for servers that send one for each publication:
 * what is compressed has no markers. With `--words 1` a payload is text, of words and numbers, not one
 * letter over and over.
 *
 * Prints one JSON object. Build: cc -O2 -o load load.c
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
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
#ifdef TLS
#include <openssl/ssl.h>
#endif

#define READ_SIZE (256 * 1024)
#define STAMP 16 /* hex digits of the nanosecond clock behind the marker */
#define MOST_SAMPLES 4000000
#define TEXT_SIZE 4096
#define WRITES_PER_TURN 64 /* then what has come in is read */
#define STALL_NS 1000000000u
#define READY_NS 120000000000u
#define SETTLE_NS 50000000u /* some servers upgrade first and subscribe a little later */

enum role { FILLS, SUBSCRIBES, PUBLISHES };
enum phase { CONNECTING, SHAKING, UPGRADING, GREETING, READY };

struct peer {
    int fd, index, topic;
    enum role role;
    enum phase phase;
    char *out; /* what a full socket did not take */
    size_t out_len, out_cap;
    int wants_write;
    char tail[STAMP + 4]; /* the end of the last read: a marker may lie across two */
    int tail_len, asking; /* whether a request has yet to be answered */
    size_t skip;        /* bytes of a payload that are still to come */
    char *greeting;     /* what came before it was ready */
    size_t greeting_len;
    char address[24];   /* what followed --fd-token */
    char *burst;        /* ready frames of a publisher, or its request */
    size_t burst_len, body, stamp_at; /* where the frame's body and the time in it begin */
    unsigned char mask[4];
#ifdef TLS
    SSL *ssl;
#endif
};

struct topic {
    uint64_t sent, received;
    int subs, pubs, turn, queued;
};

static const char *host = "127.0.0.1", *path = "/", *pub_path = "", *upgrade_extra = "";
static const char *sub_hello = "", *pub_hello = "", *sub_ready = "", *pub_ready = "";
static const char *fill_hello = "", *fill_each = "", *fill_last = "", *fill_ready = "";
static const char *prefix = "", *suffix = "", *fd_token = "";
static const char *http = "", *http_headers = "", *batch_open = "", *batch_between = "", *batch_close = "";
static int port, subs = 1, pubs = 1, topics = 1, fill = 0, fill_count = 0, server_pid = 0;
static int payload = 64, opcode = 1, window = 256, burst = 1, batch = 1, at_once = 64;
static int frames = 0, words = 0, tls = 0;
static int step = 1; /* publications a write: --burst, or --batch */
static double seconds = 3, warm = 0.5, rate = 0;
static struct peer *peers, *subscribers, *publishers;
static struct topic *topic_of;
static int *credit_queue, credit_head = 0, credit_count = 0;
static int poll_fd, lost = 0, ready_count = 0;
static uint64_t received = 0, published = 0, bytes_in = 0;
static uint64_t *samples, sample_count = 0, latest_ns = 0;
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

/* what the system knows about the server, and about all others */

static double server_cpu(void) {
    char name[64], text[1024], *at;
    if (!server_pid) return 0;
    snprintf(name, sizeof name, "/proc/%d/stat", server_pid);
    FILE *f = fopen(name, "r");
    if (!f) return 0;
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    text[n] = 0;
    unsigned long user = 0, system = 0;
    if ((at = strrchr(text, ')')))
        sscanf(at + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system);
    return (double)(user + system) / sysconf(_SC_CLK_TCK);
}

static double machine_cpu(void) {
    unsigned long long user = 0, nice = 0, system = 0, idle, wait, irq = 0, soft = 0, steal = 0;
    FILE *f = fopen("/proc/stat", "r");
    if (!f) return 0;
    if (fscanf(f, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle, &wait,
               &irq, &soft, &steal) != 8) user = 0;
    fclose(f);
    return (double)(user + nice + system + irq + soft + steal) / sysconf(_SC_CLK_TCK);
}

static double server_kib(void) {
    char name[64], line[256];
    double kib = 0;
    if (!server_pid) return 0;
    snprintf(name, sizeof name, "/proc/%d/status", server_pid);
    FILE *f = fopen(name, "r");
    if (!f) return 0;
    while (fgets(line, sizeof line, f))
        if (!strncmp(line, "VmRSS:", 6)) kib = atof(line + 6);
    fclose(f);
    return kib;
}

static int server_files(void) {
    char name[64];
    int count = 0;
    snprintf(name, sizeof name, "/proc/%d/fd", server_pid);
    DIR *d = opendir(name);
    if (!d) return 0;
    while (readdir(d)) count++;
    closedir(d);
    return count;
}

/* texts and frames */

static size_t expand(char *to, const char *from, struct peer *p, int number) {
    char *start = to;
    for (; *from; from++) {
        if (to - start > TEXT_SIZE - 32) {
            fprintf(stderr, "load: a text is longer than %d bytes\n", TEXT_SIZE - 32);
            exit(2);
        }
        if (from[0] == '%' && from[1] == 'T') to += sprintf(to, "%d", p->topic), from++;
        else if (from[0] == '%' && from[1] == 'I') to += sprintf(to, "%d", p->index), from++;
        else if (from[0] == '%' && from[1] == 'N') to += sprintf(to, "%d", number), from++;
        else if (from[0] == '%' && from[1] == 'F')
            to += sprintf(to, "%s", subscribers[p->index % subs].address), from++;
        else if (from[0] == '\\' && from[1] == 'n') *to++ = '\n', from++;
        else if (from[0] == '\\' && from[1] == 'r') *to++ = '\r', from++;
        else *to++ = *from;
    }
    *to = 0;
    return to - start;
}

static size_t put_frame(char *to, const char *data, size_t len, const unsigned char *mask) {
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
    memcpy(to + n, mask, 4);
    n += 4;
    for (size_t i = 0; i < len; i++) to[n + i] = data[i] ^ mask[i & 3];
    return n + len;
}

static void watch(struct peer *p, int write) {
    if (p->wants_write == write) return;
    struct epoll_event e = {.events = EPOLLIN | (write ? EPOLLOUT : 0), .data.ptr = p};
    epoll_ctl(poll_fd, EPOLL_CTL_MOD, p->fd, &e);
    p->wants_write = write;
}

/* bytes to and from a server: as send() and recv(), over TLS too */

#ifdef TLS
static SSL_CTX *tls_context;

static void begin_tls(struct peer *p) {
    if (!tls_context) {
        tls_context = SSL_CTX_new(TLS_client_method());
        SSL_CTX_set_mode(tls_context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
        SSL_CTX_set_session_cache_mode(tls_context, SSL_SESS_CACHE_OFF);
    }
    p->ssl = SSL_new(tls_context);
    if (!p->ssl || !SSL_set_fd(p->ssl, p->fd)) die("TLS");
    SSL_set_connect_state(p->ssl);
}

static ssize_t said_by_tls(struct peer *p, int n) {
    if (n > 0) return n;
    int error = SSL_get_error(p->ssl, n);
    if (error == SSL_ERROR_ZERO_RETURN) return 0;
    errno = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE ? EAGAIN : EPROTO;
    return -1;
}

/* 1 when it is done; else as said_by_tls. */
static ssize_t shake_hands(struct peer *p) { return said_by_tls(p, SSL_do_handshake(p->ssl)); }

static void end_tls(struct peer *p) {
    if (p->ssl) SSL_free(p->ssl);
    p->ssl = 0;
}
#else
static void begin_tls(struct peer *p) { (void)p; }
static ssize_t shake_hands(struct peer *p) { (void)p; return 1; }
static void end_tls(struct peer *p) { (void)p; }
#endif

static ssize_t give(struct peer *p, const char *data, size_t len) {
#ifdef TLS
    if (p->ssl) return said_by_tls(p, SSL_write(p->ssl, data, (int)len));
#endif
    return send(p->fd, data, len, MSG_NOSIGNAL);
}

static ssize_t take(struct peer *p, char *to, size_t len) {
#ifdef TLS
    if (p->ssl) return said_by_tls(p, SSL_read(p->ssl, to, (int)len));
#endif
    return recv(p->fd, to, len, 0);
}

static void gone(struct peer *p) {
    if (p->fd < 0) return;
    end_tls(p);
    close(p->fd);
    p->fd = -1;
    lost++;
}

static void flush_out(struct peer *p) {
    if (p->fd < 0 || !p->out_len) return;
    ssize_t n = give(p, p->out, p->out_len);
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

static void queue_texts(struct peer *p, const char *texts, int number) {
    char text[TEXT_SIZE], frame[TEXT_SIZE + 16];
    char *copy = strdup(texts), *save, *part;
    for (part = strtok_r(copy, "|", &save); part; part = strtok_r(0, "|", &save))
        queue(p, frame, put_frame(frame, text, expand(text, part, p, number), p->mask));
    free(copy);
}

/* publishing */

static size_t put_payload(char *to) {
    static const char *const said[] = {"symbol", "price", "volume", "venue", "side", "buy", "sell", "open", "bid", "ask"};
    uint32_t chance = 1;
    size_t n = sprintf(to, "#@");
    while (words && n + 40 < (size_t)payload) {
        chance = chance * 1103515245u + 12345u;
        n += sprintf(to + n, "%s %s %u, ", said[(chance >> 16) % 10], said[(chance >> 24) % 10], (chance >> 8) % 100000);
    }
    memset(to + n, 'x', payload - n);
    return payload;
}

static void prepare_request(struct peer *p) {
    char where[TEXT_SIZE], more[TEXT_SIZE], *text = malloc((size_t)batch * (payload + 3 * TEXT_SIZE) + TEXT_SIZE);
    p->burst = malloc((size_t)batch * (payload + 3 * TEXT_SIZE) + 4 * TEXT_SIZE);
    if (!text || !p->burst) die("memory");
    size_t n = expand(text, batch_open, p, 0);
    for (int i = 0; i < batch; i++) {
        if (i) n += expand(text + n, batch_between, p, 0);
        n += expand(text + n, prefix, p, 0);
        n += put_payload(text + n);
        n += expand(text + n, suffix, p, 0);
    }
    n += expand(text + n, batch_close, p, 0);
    expand(where, http, p, 0);
    expand(more, http_headers, p, 0);
    p->burst_len = sprintf(p->burst, "POST %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\n"
                           "Content-Length: %zu\r\n%s\r\n", where, host, port, n, more);
    memcpy(p->burst + p->burst_len, text, n);
    p->burst_len += n;
    free(text);
}

static void prepare(struct peer *p) {
    if (*http) {
        prepare_request(p);
        return;
    }
    char *text = malloc(payload + 2 * TEXT_SIZE), *frame = malloc(payload + 2 * TEXT_SIZE);
    size_t n = expand(text, prefix, p, 0);
    p->stamp_at = n + 2;
    n += put_payload(text + n);
    n += expand(text + n, suffix, p, 0);
    size_t frame_len = put_frame(frame, text, n, p->mask);
    p->body = frame_len - n;
    p->stamp_at += p->body;
    p->burst_len = frame_len * burst;
    p->burst = malloc(p->burst_len);
    if (!p->burst) die("memory");
    for (int i = 0; i < burst; i++) memcpy(p->burst + i * frame_len, frame, frame_len);
    free(text);
    free(frame);
}

static void stamp(struct peer *p, uint64_t ns) {
    for (int i = 0; i < STAMP; i++) {
        char digit = "0123456789abcdef"[(ns >> (4 * (STAMP - 1 - i))) & 15];
        p->burst[p->stamp_at + i] = digit ^ p->mask[(p->stamp_at - p->body + i) & 3];
    }
}

/* One send() of a whole burst, or of a request; what the socket does not take goes out as it drains. */
static void publish(struct peer *p) {
    size_t len = p->burst_len;
    ssize_t n = p->out_len ? 0 : give(p, p->burst, len);
    if (n < 0) {
        if (errno != EAGAIN) {
            gone(p);
            return;
        }
        n = 0;
    }
    if ((size_t)n < len) {
        queue(p, p->burst + n, len - n);
        watch(p, 1);
    }
    topic_of[p->topic].sent += step;
    if (*http) p->asking = 1;
    else published += step;
}

static void may_publish(int number) {
    struct topic *t = &topic_of[number];
    if (t->queued) return;
    t->queued = 1;
    credit_queue[(credit_head + credit_count++) % topics] = number;
}

/* Let topics publish what their windows allow; each in its turn, a few writes at a time. */
static int publish_allowed(void) {
    int writes = 0, visits = credit_count;
    while (visits-- && writes < WRITES_PER_TURN) {
        int number = credit_queue[credit_head];
        struct topic *t = &topic_of[number];
        credit_head = (credit_head + 1) % topics;
        credit_count--;
        t->queued = 0;
        int idle = 0, more = 1;
        while ((more = t->sent + step <= t->received / t->subs + window) && idle < t->pubs &&
               writes < WRITES_PER_TURN) {
            struct peer *p = &publishers[number + topics * (t->turn++ % t->pubs)];
            if (p->fd < 0 || p->out_len || p->asking) {
                idle++;
                continue;
            }
            idle = 0;
            publish(p);
            writes++;
        }
        if (more && idle < t->pubs) may_publish(number);
    }
    return writes;
}

/* reading */

/* Deliveries by the headers of frames alone. `tail` holds the start of a header that is not whole. */
static void count_frames(struct peer *p, char *data, size_t len) {
    uint64_t count = 0;
    char *end = data + len;
    p->tail_len = 0;
    while (data < end) {
        if (p->skip) {
            size_t n = (size_t)(end - data) < p->skip ? (size_t)(end - data) : p->skip;
            data += n;
            p->skip -= n;
            continue;
        }
        size_t have = end - data, size = have < 2 ? 2 : (data[1] & 127) == 127 ? 10 : (data[1] & 127) == 126 ? 4 : 2;
        if (have < size) {
            p->tail_len = have;
            memcpy(p->tail, data, have);
            break;
        }
        unsigned char *at = (unsigned char *)data;
        uint64_t length = at[1] & 127;
        if (size > 2) {
            length = 0;
            for (size_t i = 2; i < size; i++) length = length << 8 | at[i];
        }
        count += (at[0] & 15) == 1 || (at[0] & 15) == 2;
        data += size;
        p->skip = length;
    }
    if (!count || p->role != SUBSCRIBES) return;
    received += count;
    topic_of[p->topic].received += count;
    if (rate == 0) may_publish(p->topic);
}

static void count_markers(struct peer *p, char *data, size_t len) {
    size_t need = rate > 0 ? STAMP + 2 : 2, rest = payload - need;
    uint64_t count = 0, arrived = rate > 0 ? now_ns() : 0;
    char *end = data + len;
    p->tail_len = 0;
    while (data < end) {
        if (p->skip) {
            size_t n = (size_t)(end - data) < p->skip ? (size_t)(end - data) : p->skip;
            data += n;
            p->skip -= n;
            continue;
        }
        data = memchr(data, '#', end - data);
        if (!data) break;
        if ((size_t)(end - data) < need) {
            p->tail_len = end - data;
            memcpy(p->tail, data, p->tail_len);
            break;
        }
        if (data[1] != '@') {
            data++;
            continue;
        }
        count++;
        if (measuring && rate > 0 && sample_count < MOST_SAMPLES) {
            char hex[STAMP + 1];
            memcpy(hex, data + 2, STAMP);
            hex[STAMP] = 0;
            samples[sample_count++] = arrived - strtoull(hex, 0, 16);
        }
        data += need;
        p->skip = rest;
    }
    if (!count || p->role != SUBSCRIBES) return;
    received += count;
    topic_of[p->topic].received += count;
    if (rate == 0) may_publish(p->topic);
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
        if (p->role == FILLS) {
            queue_texts(p, fill_hello, 0);
            for (int i = 0; i < fill_count; i++) queue_texts(p, fill_each, p->index * fill_count + i);
            queue_texts(p, fill_last, 0);
        } else queue_texts(p, p->role == PUBLISHES ? pub_hello : sub_hello, 0);
        flush_out(p);
    }
    const char *token = p->role == FILLS ? fill_ready : p->role == PUBLISHES ? pub_ready : sub_ready;
    if (*token && !memmem(p->greeting, p->greeting_len, token, strlen(token))) return;
    if (*fd_token && p->role == SUBSCRIBES) {
        char *at = memmem(p->greeting, p->greeting_len, fd_token, strlen(fd_token));
        if (!at) return;
        sscanf(at + strlen(fd_token), "%20[0-9]", p->address);
    }
    p->phase = READY;
    ready_count++;
    free(p->greeting);
    p->greeting = 0;
}

/* The answer to a request; it is kept until it is whole. */
static void take_answer(struct peer *p, const char *data, size_t len) {
    p->greeting = realloc(p->greeting, p->greeting_len + len + 1);
    if (!p->greeting) die("memory");
    memcpy(p->greeting + p->greeting_len, data, len);
    p->greeting_len += len;
    p->greeting[p->greeting_len] = 0;
    char *end = strstr(p->greeting, "\r\n\r\n"), *length;
    if (!end) return;
    length = strcasestr(p->greeting, "\r\nContent-Length:");
    if (strncmp(p->greeting, "HTTP/1.1 2", 10) || !length || length > end) {
        fprintf(stderr, "load: not an answer with 2xx and a Content-Length: %.200s\n", p->greeting);
        exit(1);
    }
    if (p->greeting_len < (size_t)(end - p->greeting) + 4 + strtoul(length + 17, 0, 10)) return;
    p->greeting_len = 0;
    p->asking = 0;
    published += step;
    may_publish(p->topic);
}

/* One read; whether there may be more that the system does not know of. */
static int read_once(struct peer *p) {
    if (p->tail_len) memcpy(buffer, p->tail, p->tail_len);
    ssize_t n = take(p, buffer + p->tail_len, READ_SIZE);
    if (n <= 0) {
        if (n == 0 || errno != EAGAIN) gone(p);
        return 0;
    }
    bytes_in += n;
    if (p->phase != READY) greet(p, buffer, n);
    else if (*http && p->role == PUBLISHES) take_answer(p, buffer, n);
    else if (frames) count_frames(p, buffer, n + p->tail_len);
    else count_markers(p, buffer, n + p->tail_len);
    return tls && p->fd >= 0;
}

static void read_from(struct peer *p) {
    while (read_once(p)) continue;
}

static void connected(struct peer *p) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(p->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        errno = error;
        die("connect");
    }
    if (tls && p->phase == CONNECTING) {
        begin_tls(p);
        p->phase = SHAKING;
        watch(p, 0);
    }
    if (p->phase == SHAKING && shake_hands(p) != 1) {
        if (errno != EAGAIN) die("TLS handshake");
        return;
    }
    if (*http && p->role == PUBLISHES) {
        p->phase = READY;
        ready_count++;
        watch(p, 0);
        return;
    }
    p->phase = UPGRADING;
    char where[TEXT_SIZE], head[2 * TEXT_SIZE];
    expand(where, p->role == PUBLISHES && *pub_path ? pub_path : path, p, 0);
    int n = snprintf(head, sizeof head,
                     "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%s\r\n",
                     where, host, port, upgrade_extra);
    queue(p, head, n);
    flush_out(p);
    watch(p, p->out_len > 0);
}

static int turn(int wait_ms) {
    struct epoll_event events[256];
    int n = epoll_wait(poll_fd, events, 256, wait_ms);
    for (int i = 0; i < n; i++) {
        struct peer *p = events[i].data.ptr;
        if (p->fd < 0) continue;
        if (p->phase == CONNECTING || p->phase == SHAKING) {
            connected(p);
            continue;
        }
        if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read_from(p);
        if (p->fd >= 0 && events[i].events & EPOLLOUT) {
            flush_out(p);
            if (p->role == PUBLISHES && !p->out_len && rate == 0) may_publish(p->topic);
        }
    }
    return n;
}

static void open_peer(struct peer *p) {
    p->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (p->fd < 0) die("socket");
    int one = 1;
    setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (!strncmp(host, "127.", 4)) {
        /* Many source addresses, or the ports of closed connections would run out. */
        int i = (int)(p - peers);
        struct sockaddr_in from = {.sin_family = AF_INET};
        from.sin_addr.s_addr = htonl(0x7f000000u | (1 + getpid() % 200) << 16 | (i % 16) << 8 | 1);
        setsockopt(p->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
        if (bind(p->fd, (struct sockaddr *)&from, sizeof from)) die("bind");
    }
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, host, &to.sin_addr);
    if (connect(p->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) die("connect");
    p->wants_write = 1;
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = p};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, p->fd, &e);
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
        TEXT("--host", host) INT("--port", port) TEXT("--path", path) TEXT("--pub-path", pub_path)
        INT("--subs", subs) INT("--pubs", pubs) INT("--topics", topics) INT("--pid", server_pid)
        INT("--payload", payload) INT("--opcode", opcode) INT("--window", window)
        INT("--burst", burst) INT("--at-once", at_once) INT("--frames", frames) INT("--words", words)
        REAL("--seconds", seconds) REAL("--warm", warm) REAL("--rate", rate)
        TEXT("--sub-hello", sub_hello) TEXT("--pub-hello", pub_hello)
        TEXT("--sub-ready", sub_ready) TEXT("--pub-ready", pub_ready)
        INT("--fill", fill) INT("--fill-count", fill_count) TEXT("--fill-hello", fill_hello)
        TEXT("--fill-each", fill_each) TEXT("--fill-last", fill_last) TEXT("--fill-ready", fill_ready)
        TEXT("--prefix", prefix) TEXT("--suffix", suffix) TEXT("--upgrade", upgrade_extra)
        TEXT("--fd-token", fd_token) TEXT("--http", http) TEXT("--http-headers", http_headers)
        INT("--batch", batch) TEXT("--batch-open", batch_open) TEXT("--batch-close", batch_close)
        TEXT("--batch-between", batch_between) INT("--tls", tls)
        fprintf(stderr, "load: unknown option %s\n", name);
        return 2;
    }
#ifndef TLS
    if (tls) {
        fprintf(stderr, "load: built without OpenSSL\n");
        return 2;
    }
#endif
    step = *http ? batch : burst;
    if (payload < (rate > 0 ? STAMP + 2 : 2) || window < step || step < 1 || (rate > 0 && (burst > 1 || *http)) ||
        subs < topics || (pubs && pubs < topics)) {
        fprintf(stderr, "load: a payload holds the marker (and paced, its time), a window at least one "
                        "burst, a topic at least one subscriber and one publisher; paced, burst is 1 and "
                        "there is no HTTP\n");
        return 2;
    }
    struct rlimit files = {0};
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_max < (rlim_t)(fill + subs + pubs + 16)) {
        fprintf(stderr, "load: %d connections need a higher ulimit -n than %d\n", fill + subs + pubs,
                (int)files.rlim_max);
        return 2;
    }
    srandom(getpid());
    samples = malloc(MOST_SAMPLES * sizeof *samples);
    topic_of = calloc(topics, sizeof *topic_of);
    credit_queue = calloc(topics, sizeof *credit_queue);
    poll_fd = epoll_create1(0);
    int all = fill + subs + pubs, mark = subs > 1000 ? 100 : 0;
    peers = calloc(all, sizeof *peers);
    subscribers = peers + fill;
    publishers = subscribers + subs;
    int files_before = server_pid ? server_files() : 0;
    double kib_before = mark ? 0 : server_kib(), connect_cpu = server_cpu(), leave_cpu = 0;
    uint64_t connect_start = now_ns();
    for (int opened = 0; ready_count < all;) {
        if (opened < all && opened - ready_count < at_once &&
            /* the first ones are alone, to tell the server's own size from that of its peers */
            (opened < mark || kib_before || ready_count >= mark)) {
            if (mark && !kib_before && opened == mark) {
                kib_before = server_kib();
                connect_start = now_ns(), connect_cpu = server_cpu();
            }
            struct peer *p = &peers[opened];
            p->role = opened < fill ? FILLS : opened < fill + subs ? SUBSCRIBES : PUBLISHES;
            p->index = opened - (p->role == FILLS ? 0 : p->role == SUBSCRIBES ? fill : fill + subs);
            p->topic = p->index % topics;
            long key = random();
            memcpy(p->mask, &key, 4);
            open_peer(p);
            opened++;
            if (opened % 32) continue;
        }
        turn(opened < all && opened - ready_count < at_once ? 0 : 100);
        if (lost) {
            fprintf(stderr, "load: the server closed %d connections before they were ready\n", lost);
            return 1;
        }
        if (now_ns() - connect_start > READY_NS) {
            fprintf(stderr, "load: only %d of %d peers got ready\n", ready_count, all);
            return 1;
        }
    }
    double connect_seconds = (now_ns() - connect_start) / 1e9, noticed = 0;
    connect_cpu = server_cpu() - connect_cpu;
    for (uint64_t until = now_ns() + SETTLE_NS; pubs && now_ns() < until;) turn(10);
    for (int i = 0; i < subs; i++) topic_of[subscribers[i].topic].subs++;
    for (int i = 0; i < pubs; i++) topic_of[publishers[i].topic].pubs++, prepare(&publishers[i]);
    for (int i = 0; pubs && i < topics; i++) may_publish(i);
    uint64_t start = now_ns(), end = start + (uint64_t)((warm + seconds) * 1e9);
    uint64_t from = start + (uint64_t)(warm * 1e9), t = start, next = start, moved = start;
    uint64_t received_before = 0, published_before = 0, bytes_before = 0, received_last = 0;
    double cpu_before = 0, server_before = 0, machine_before = 0;
    int turn_of = 0, stalled = 0;
    while ((t = now_ns()) < end && lost < all) {
        if (!measuring && t >= from) {
            measuring = 1;
            from = t;
            latest_ns = 0;
            received_before = received, published_before = published, bytes_before = bytes_in;
            cpu_before = cpu_seconds(), server_before = server_cpu(), machine_before = machine_cpu();
        }
        if (!pubs) {
            turn(100);
        } else if (rate > 0) {
            while (next <= t) {
                struct peer *p = &publishers[turn_of++ % pubs];
                stamp(p, next);
                publish(p);
                if (t - next > latest_ns) latest_ns = t - next;
                next += (uint64_t)(1e9 / rate);
            }
            uint64_t left = next - t;
            turn(left > 1500000 ? 1 : 0);
        } else {
            int writes = publish_allowed();
            turn(writes || credit_count ? 0 : 10);
            if (received != received_last) received_last = received, moved = t;
            else if (t - moved > STALL_NS) {
                stalled = 1;
                break;
            }
        }
    }
    double elapsed = (t - from) / 1e9, kib_after = server_kib();
    double cpu = (cpu_seconds() - cpu_before) / elapsed;
    double server = (server_cpu() - server_before) / elapsed;
    double others = (machine_cpu() - machine_before) / elapsed - cpu - (server_pid ? server : 0);
    int lost_before = lost;
    if (!pubs && server_pid) {
        uint64_t leaving = now_ns();
        leave_cpu = server_cpu();
        for (int i = 0; i < all; i++) gone(&peers[i]);
        while (server_files() > files_before && now_ns() - leaving < READY_NS) usleep(2000);
        noticed = (now_ns() - leaving) / 1e9;
        leave_cpu = server_cpu() - leave_cpu;
    }
    uint64_t got = received - received_before;
    qsort(samples, sample_count, sizeof *samples, compare);
    printf("{\"deliveries_per_second\": %.0f, \"publishes_per_second\": %.0f, "
           "\"megabytes_per_second\": %.1f, \"bytes_per_delivery\": %.0f, \"seconds\": %.3f, \"lost_connections\": %d, "
           "\"stalled\": %s, \"connects_per_second\": %.0f, \"kib_per_connection\": %.2f, "
           "\"noticed_seconds\": %.3f, \"connect_cpu_ms\": %.4f, \"leave_cpu_ms\": %.4f, \"load_cpu\": %.3f, \"server_cpu\": %.3f, \"others_cpu\": %.3f, "
           "\"latest_ms\": %.3f, \"samples\": %llu, \"p50_ms\": %.3f, \"p99_ms\": %.3f, "
           "\"p999_ms\": %.3f}\n",
           got / elapsed, (published - published_before) / elapsed, (bytes_in - bytes_before) / elapsed / 1e6,
           got ? (double)(bytes_in - bytes_before) / got : 0, elapsed, lost_before, stalled ? "true" : "false", (all - mark) / connect_seconds,
           server_pid ? (kib_after - kib_before) / (all - mark) : 0, noticed,
           connect_cpu * 1e3 / (all - mark), leave_cpu * 1e3 / all, cpu, server,
           others > 0 ? others : 0, latest_ns / 1e6, (unsigned long long)sample_count, percentile(.5),
           percentile(.99), percentile(.999));
    return 0;
}
