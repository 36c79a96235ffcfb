/* HTTP/1.1 load over many keep-alive connections from one thread, every answer checked.
 *
 *   load PORT CONNECTIONS SECONDS RATE closed|constant|poisson SEED MANIFEST
 *
 * closed: each connection sends its next request when it has its answer; latency counts from the send. RATE is 0.
 * constant, poisson: requests are due on a schedule of RATE a second, whatever the server does; latency counts from
 * the moment a request was due, so time that it waited for a free connection is in it. Connections are opened as they
 * are needed, up to CONNECTIONS.
 *
 * MANIFEST has a line for each request, taken in turn:   FILE <tab> KIND <tab> WANTED
 *   FILE is the whole request as it is sent. KIND says how its answer's body is judged:
 *   exact    it is the bytes of the file WANTED
 *   labels   it is one flat JSON object with just the pairs of WANTED (cat=0.51,dog=0.2,...), in that order, each number
 *            within 0.001 of the wanted one
 *   inside   those pairs in that order, with other text around them (an object in a string of a larger answer)
 * A body that was found right is remembered, so that the same bytes for the same request are compared, not parsed.
 *
 * Standard output is one JSON object. "seconds" is from the first send to the last answer; "histogram" has bucket:count
 * where bucket b holds latencies up to 1.05^b microseconds. Requests without an answer 10 s after the end are "hung".
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { PAIRS = 16, KNOWN = 32, BUFFER = 1 << 16, BUCKETS = 500, DRAIN = 10 };
enum Kind { EXACT, LABELS, INSIDE };
static const double TOLERANCE = 0.001;

typedef struct {
    char *text;
    size_t size;
} Bytes;

typedef struct {
    Bytes request;
    enum Kind kind;
    Bytes wanted; /* of EXACT */
    int pairs;
    char names[PAIRS][64];
    double values[PAIRS];
    Bytes known[KNOWN]; /* bodies that were right before */
    int knowns;
} Case;

typedef struct {
    int fd, busy;
    size_t sent, got;
    const Case *asked;
    int64_t due;
    char buffer[BUFFER];
} Connection;

static Case *cases;
static int case_count, next_case;
static Connection **connections, **idle;
static int opened, idles, busy, limit, events_fd;
static struct sockaddr_in server;
static int64_t *waiting; /* due times of requests that found no free connection: a ring */
static size_t ring, first_waiting, count_waiting;
static uint64_t histogram[BUCKETS], answered, right, bad_status, wrong, broken, peak;
static float *latencies; /* of every right answer, in microseconds */
static size_t latencies_kept, latencies_room;
static double sum_us, largest_us;
static int64_t last_answer;
static char complaint[256];

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(2);
}

static Bytes read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) die(path);
    fseek(file, 0, SEEK_END);
    Bytes found = {NULL, (size_t)ftell(file)};
    rewind(file);
    found.text = malloc(found.size + 1);
    if (fread(found.text, 1, found.size, file) != found.size) die(path);
    found.text[found.size] = 0;
    fclose(file);
    return found;
}

static void read_manifest(const char *path) {
    Bytes all = read_file(path);
    for (char *line = strtok(all.text, "\n"); line; line = strtok(NULL, "\n")) {
        char *kind = strchr(line, '\t'), *wanted = kind ? strchr(kind + 1, '\t') : NULL;
        if (!wanted) {
            fprintf(stderr, "%s: not FILE, KIND, WANTED: %s\n", path, line);
            exit(2);
        }
        *kind++ = 0;
        *wanted++ = 0;
        cases = realloc(cases, sizeof(Case) * (size_t)(case_count + 1));
        Case *one = memset(&cases[case_count++], 0, sizeof(Case));
        one->request = read_file(line);
        one->kind = !strcmp(kind, "exact") ? EXACT : !strcmp(kind, "labels") ? LABELS : INSIDE;
        if (one->kind == EXACT) {
            one->wanted = read_file(wanted);
            continue;
        }
        for (char *at = wanted; *at && one->pairs < PAIRS; one->pairs++) {
            char *equals = strchr(at, '='), *end;
            if (!equals || equals - at > 63) {
                fprintf(stderr, "%s: not name=number: %s\n", path, at);
                exit(2);
            }
            memcpy(one->names[one->pairs], at, (size_t)(equals - at));
            one->values[one->pairs] = strtod(equals + 1, &end);
            at = *end == ',' ? end + 1 : end;
        }
    }
    if (!case_count) {
        fprintf(stderr, "%s is empty\n", path);
        exit(2);
    }
}

static const char *skip(const char *at, const char *any) { return at + strspn(at, any); }

/* The pairs of `one`, in order; `body` ends with a zero. */
static int pairs_are_right(const Case *one, const char *body) {
    const char *at = body;
    if (one->kind == LABELS) {
        at = skip(at, " \t\r\n");
        if (*at++ != '{') return 0;
    }
    for (int i = 0; i < one->pairs; i++) {
        size_t length = strlen(one->names[i]);
        if (one->kind == LABELS) {
            at = skip(at, " \t\r\n");
            if (*at++ != '"' || strncmp(at, one->names[i], length) || at[length] != '"') return 0;
            at = skip(at + length + 1, " \t\r\n");
        } else {
            do { /* a quoted name, its quotes escaped or not */
                at = strstr(at, one->names[i]);
                if (!at) return 0;
                at += length;
            } while (*at != '"' && *at != '\\');
            at = skip(at, "\\\" \t\r\n");
        }
        if (*at++ != ':') return 0;
        char *end;
        double value = strtod(at, &end);
        if (end == at || !(fabs(value - one->values[i]) <= TOLERANCE)) return 0;
        at = skip(end, " \t\r\n");
        if (one->kind == LABELS && *at++ != (i + 1 < one->pairs ? ',' : '}')) return 0;
    }
    return one->kind == INSIDE || !*skip(at, " \t\r\n");
}

static int is_right(Case *one, const char *body, size_t size) {
    if (one->kind == EXACT) return size == one->wanted.size && !memcmp(body, one->wanted.text, size);
    for (int i = 0; i < one->knowns; i++)
        if (one->known[i].size == size && !memcmp(one->known[i].text, body, size)) return 1;
    char text[BUFFER + 1];
    memcpy(text, body, size);
    text[size] = 0;
    if (strlen(text) != size || !pairs_are_right(one, text)) return 0;
    if (one->knowns < KNOWN) {
        one->known[one->knowns].text = malloc(size);
        memcpy(one->known[one->knowns].text, body, size);
        one->known[one->knowns++].size = size;
    }
    return 1;
}

static void complain(const char *what, const char *text, size_t size) {
    if (complaint[0]) return;
    size_t used = (size_t)snprintf(complaint, sizeof complaint, "%s: ", what);
    for (size_t i = 0; i < size && used < sizeof complaint - 1; i++) {
        unsigned char c = (unsigned char)text[i];
        complaint[used++] = c >= 32 && c < 127 && c != '"' && c != '\\' ? (char)c : '.';
    }
}

static void count(int64_t due) {
    int64_t now = now_ns();
    double us = (double)(now - due) / 1000;
    int bucket = us <= 1 ? 0 : (int)ceil(log(us) / log(1.05));
    histogram[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    if (latencies_kept == latencies_room) {
        latencies_room = latencies_room ? latencies_room * 2 : 1 << 17;
        if (!(latencies = realloc(latencies, latencies_room * sizeof *latencies))) die("realloc");
    }
    latencies[latencies_kept++] = (float)us;
    sum_us += us;
    if (us > largest_us) largest_us = us;
    last_answer = now;
}

static void watch(Connection *one, int writing) {
    struct epoll_event event = {.events = EPOLLIN | (writing ? EPOLLOUT : 0), .data.ptr = one};
    if (epoll_ctl(events_fd, EPOLL_CTL_MOD, one->fd, &event)) die("epoll_ctl");
}

static void join(Connection *one) {
    one->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (one->fd < 0) die("socket");
    int yes = 1;
    setsockopt(one->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (connect(one->fd, (struct sockaddr *)&server, sizeof server)) die("connect");
    fcntl(one->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = one};
    if (epoll_ctl(events_fd, EPOLL_CTL_ADD, one->fd, &event)) die("epoll_ctl");
    one->busy = 0;
}

static Connection *open_one(void) {
    Connection *one = calloc(1, sizeof *one);
    join(one);
    return connections[opened++] = one;
}

/* The connection failed or was closed: its request, if any, is broken; a new one takes its place. */
static void renew(Connection *one) {
    close(one->fd);
    if (one->busy) {
        busy--;
        answered++;
        broken++;
        complain("broken", strerror(errno), strlen(strerror(errno)));
    } else {
        for (int i = 0; i < idles; i++)
            if (idle[i] == one) {
                idle[i] = idle[--idles];
                break;
            }
    }
    join(one);
}

static int write_more(Connection *one) {
    while (one->sent < one->asked->request.size) {
        ssize_t n = send(one->fd, one->asked->request.text + one->sent, one->asked->request.size - one->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            watch(one, 1);
            return 1;
        }
        if (n <= 0) return 0;
        one->sent += (size_t)n;
    }
    return 1;
}

static void ask(Connection *one, int64_t due) {
    one->asked = &cases[next_case];
    next_case = (next_case + 1) % case_count;
    one->sent = one->got = 0;
    one->busy = 1;
    one->due = due;
    if ((uint64_t)++busy > peak) peak = (uint64_t)busy;
    if (!write_more(one)) {
        renew(one);
        idle[idles++] = one;
    }
}

/* 1: a whole answer was read and judged; 0: more is to come; -1: the connection is of no more use. */
static int read_more(Connection *one) {
    ssize_t n = recv(one->fd, one->buffer + one->got, BUFFER - 1 - one->got, 0);
    if (n < 0 && errno == EAGAIN) return 0;
    if (n <= 0 || !one->busy) {
        if (n == 0) errno = ECONNRESET;
        return -1;
    }
    one->got += (size_t)n;
    one->buffer[one->got] = 0;
    char *end = memmem(one->buffer, one->got, "\r\n\r\n", 4);
    if (!end) return one->got < BUFFER - 1 ? 0 : -1;
    char *header = strcasestr(one->buffer, "\r\ncontent-length:");
    if (!header || header > end) {
        complain("no content-length", one->buffer, one->got);
        errno = EPROTO;
        return -1;
    }
    size_t size = strtoul(header + 17, NULL, 10), start = (size_t)(end + 4 - one->buffer);
    if (start + size > BUFFER - 1) {
        errno = EMSGSIZE;
        return -1;
    }
    if (one->got < start + size) return 0;
    answered++;
    if (strncmp(one->buffer, "HTTP/1.1 200", 12)) {
        bad_status++;
        complain("status", one->buffer, one->got);
    } else if (one->got != start + size || !is_right((Case *)one->asked, one->buffer + start, size)) {
        wrong++;
        complain("wrong answer", one->buffer + start, one->got - start);
    } else {
        right++;
        count(one->due);
    }
    one->busy = 0;
    busy--;
    char *closing = strcasestr(one->buffer, "\r\nconnection: close");
    if (closing && closing < end) renew(one);
    return 1;
}

static double uniform(uint64_t *state) { /* xorshift64*, Vigna 2016; in (0, 1] */
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return ((double)((*state * 2685821657736338717ULL) >> 11) + 1) / 9007199254740992.0;
}

static int order(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* The smallest latency that a `share` of all do not exceed; they are sorted. */
static double percentile(double share) {
    if (!latencies_kept) return 0;
    size_t rank = (size_t)ceil(share * (double)latencies_kept);
    return latencies[rank ? rank - 1 : 0];
}

int main(int argc, char **argv) {
    if (argc != 8) {
        fprintf(stderr, "usage: load PORT CONNECTIONS SECONDS RATE closed|constant|poisson SEED MANIFEST\n");
        return 2;
    }
    limit = atoi(argv[2]);
    double seconds = atof(argv[3]), rate = atof(argv[4]);
    int closed = !strcmp(argv[5], "closed"), poisson = !strcmp(argv[5], "poisson");
    uint64_t state = strtoull(argv[6], NULL, 10) * 0x9E3779B97F4A7C15ULL + 1;
    read_manifest(argv[7]);
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1]))};
    inet_pton(AF_INET, "127.0.0.1", &server.sin_addr);
    events_fd = epoll_create1(0);
    connections = calloc((size_t)limit, sizeof *connections);
    idle = calloc((size_t)limit, sizeof *idle);
    ring = closed ? 1 : (size_t)(rate * seconds * 2) + 1000;
    waiting = calloc(ring, sizeof *waiting);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[256];
    epoll_ctl(events_fd, EPOLL_CTL_ADD, timer, &event);

    int at_first = closed ? limit : limit < 16 ? limit : 16;
    while (opened < at_first) idle[idles++] = open_one();
    int64_t begun = now_ns(), end = begun + (int64_t)(seconds * 1e9);
    double due = (double)begun;
    uint64_t sent_late = 0, scheduled = 0;
    if (closed)
        while (idles) ask(idle[--idles], now_ns());
    for (;;) {
        int64_t now = now_ns();
        if (!closed) {
            while (due <= (double)now && due < (double)end) {
                if (count_waiting < ring) waiting[(first_waiting + count_waiting++) % ring] = (int64_t)due;
                scheduled++;
                due += 1e9 / rate * (poisson ? -log(uniform(&state)) : 1);
            }
            while (count_waiting && (idles || opened < limit)) {
                int64_t one_due = waiting[first_waiting];
                first_waiting = (first_waiting + 1) % ring;
                count_waiting--;
                if (now_ns() - one_due > 1000000) sent_late++;
                ask(idles ? idle[--idles] : open_one(), one_due);
            }
            struct itimerspec when = {.it_value = {(time_t)(due / 1e9), (long)fmod(due, 1e9)}};
            if (due < (double)end) timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
        }
        if (closed && now < end) /* those whose send failed */
            while (idles) ask(idle[--idles], now_ns());
        if (now >= end && !busy && !count_waiting) break;
        if (now >= end + DRAIN * 1000000000LL) break;
        int n = epoll_wait(events_fd, events, 256, now >= end ? 50 : 20);
        for (int i = 0; i < n; i++) {
            Connection *one = events[i].data.ptr;
            if (!one) {
                uint64_t ticks;
                if (read(timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN) die("timerfd");
                continue;
            }
            if (events[i].events & EPOLLOUT && one->busy) {
                watch(one, 0);
                if (!write_more(one)) {
                    renew(one);
                    idle[idles++] = one;
                    continue;
                }
            }
            if (!(events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP))) continue;
            int outcome = read_more(one), had_request = one->busy;
            if (!outcome) continue;
            if (outcome < 0) {
                renew(one);
                if (!had_request) {
                    idle[idles++] = one;
                    continue;
                }
            }
            if (closed && now_ns() < end)
                ask(one, now_ns());
            else
                idle[idles++] = one;
        }
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    qsort(latencies, latencies_kept, sizeof *latencies, order);
    double own = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                 (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    uint64_t hung = (uint64_t)busy + count_waiting;
    double took = last_answer ? (double)(last_answer - begun) / 1e9 : seconds;
    printf("{\"answered\": %lu, \"right\": %lu, \"bad_status\": %lu, \"wrong\": %lu, \"broken\": %lu, \"hung\": %lu, "
           "\"scheduled\": %lu, \"late\": %lu, \"busiest\": %lu, \"seconds\": %.4f, \"mean_us\": %.1f, \"p50_us\": %.1f, "
           "\"p90_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f, \"max_us\": %.1f, \"load_cpu_seconds\": %.3f, ",
           answered, right, bad_status, wrong, broken, hung, scheduled, sent_late, peak, took,
           right ? sum_us / (double)right : 0, percentile(0.5), percentile(0.9), percentile(0.99), percentile(0.999),
           largest_us, own);
    printf("\"complaint\": \"%s\", \"histogram\": \"", complaint);
    const char *space = "";
    for (int i = 0; i < BUCKETS; i++)
        if (histogram[i]) {
            printf("%s%d:%lu", space, i, histogram[i]);
            space = " ";
        }
    printf("\"}\n");
    return 0;
}
