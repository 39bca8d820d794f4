/* The least a server can do: what the client program allows at most.
 *
 * ceiling SOCKET-PATH|PORT IMAGE [write]
 *
 * A thread per connection, blocking calls, no checks of any kind, one send for all requests that came
 * together, sendfile from 64 KiB on. Nothing here can be slower than in a real server, so where the
 * bar of a cell lies above this program's own ratio, the client is what is being measured.
 * Only for loopback, only for the benchmark: it believes everything it is told.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { GO = 7, INFO = 6, ABORT = 2, STRUCTURED = 8, ACK = 1, REP_INFO = 3 };
enum { READ = 0, WRITE = 1, DISC = 2, REQUEST = 28 };
enum { HAS_FLAGS = 1, READ_ONLY = 2, FLUSH = 4, DF = 128, MULTI = 256 };
enum { LARGE = 1 << 16, RX = 1 << 19, TX = 1 << 22, FULL = 160 << 10, PATIENCE = 150, DEEP = 16 };

static int image, writable;
static uint64_t size;

static void take(int s, void *to, size_t length)
{
    for (char *at = to; length;) {
        ssize_t got = recv(s, at, length, 0);
        if (got <= 0)
            pthread_exit(NULL);
        at += got;
        length -= got;
    }
}

static void give(int s, const void *from, size_t length, int flags)
{
    for (const char *at = from; length;) {
        ssize_t sent = send(s, at, length, flags | MSG_NOSIGNAL);
        if (sent <= 0)
            pthread_exit(NULL);
        at += sent;
        length -= sent;
    }
}

static void answer(int s, uint32_t option, uint32_t kind, const void *data, uint32_t length)
{
    struct __attribute__((packed)) { uint64_t magic; uint32_t option, kind, length; } head = {
        htobe64(0x3e889045565a9ULL), htobe32(option), htobe32(kind), htobe32(length)};
    give(s, &head, sizeof head, length ? MSG_MORE : 0);
    give(s, data, length, 0);
}

static int handshake(int s) /* 1: structured replies */
{
    int structured = 0, on = 1;
    uint32_t client;
    give(s, "NBDMAGICIHAVEOPT\0\3", 18, 0);
    take(s, &client, 4);
    for (;;) {
        struct __attribute__((packed)) { uint64_t magic; uint32_t option, length; } head;
        static __thread char data[1 << 16];
        take(s, &head, sizeof head);
        uint32_t option = be32toh(head.option), length = be32toh(head.length);
        if (length > sizeof data)
            pthread_exit(NULL);
        take(s, data, length);
        if (option == STRUCTURED) {
            structured = 1;
            answer(s, option, ACK, NULL, 0);
        } else if (option == GO || option == INFO) {
            uint16_t flags = HAS_FLAGS | MULTI | FLUSH | (writable ? 0 : READ_ONLY) | (structured ? DF : 0);
            struct __attribute__((packed)) { uint16_t type; uint64_t size; uint16_t flags; } info = {
                0, htobe64(size), htobe16(flags)};
            answer(s, option, REP_INFO, &info, sizeof info);
            answer(s, option, ACK, NULL, 0);
            if (option == GO)
                break;
        } else if (option == ABORT) {
            answer(s, option, ACK, NULL, 0);
            pthread_exit(NULL);
        } else {
            answer(s, option, 0x80000001, NULL, 0);
        }
    }
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* fails on a Unix socket: no matter */
    return structured;
}

struct request { uint32_t magic; uint16_t flags, type; uint64_t cookie, offset; uint32_t length; } __attribute__((packed));

static size_t header(char *to, const struct request *r, int structured, uint32_t length)
{
    if (!structured) {
        struct __attribute__((packed)) { uint32_t magic, error; uint64_t cookie; } h = {
            htobe32(0x67446698), 0, r->cookie};
        memcpy(to, &h, sizeof h);
        return sizeof h;
    }
    struct __attribute__((packed)) { uint32_t magic; uint16_t flags, type; uint64_t cookie; uint32_t length; uint64_t offset; } h = {
        htobe32(0x668e33ef), htobe16(1), htobe16(length ? 1 : 0), r->cookie, htobe32(length ? length + 8 : 0), r->offset};
    size_t used = length ? sizeof h : sizeof h - sizeof h.offset;
    memcpy(to, &h, used);
    return used;
}

static ssize_t receive(int s, char *to, size_t room, int look)
{
    for (int i = 0; look && i < PATIENCE; i++) {
        ssize_t got = recv(s, to, room, MSG_DONTWAIT);
        if (got >= 0 || errno != EAGAIN)
            return got;
    }
    return recv(s, to, room, 0);
}

static void *serve(void *argument)
{
    int s = (int)(intptr_t)argument, structured = handshake(s), requests = 0;
    char *rx = malloc(RX), *tx = malloc(TX), *payload = malloc(TX);
    size_t have = 0;
    for (;;) {
        ssize_t got = receive(s, rx + have, RX - have, requests < DEEP);
        if (got <= 0)
            break;
        have += got;
        requests = 0;
        size_t at = 0, used = 0;
        while (have - at >= REQUEST) {
            struct request r;
            memcpy(&r, rx + at, REQUEST);
            at += REQUEST;
            requests++;
            uint32_t length = be32toh(r.length);
            uint64_t offset = be64toh(r.offset);
            switch (be16toh(r.type)) {
            case DISC:
                give(s, tx, used, 0);
                close(s);
                return NULL;
            case READ:
                used += header(tx + used, &r, structured, length);
                if (length >= LARGE) {
                    give(s, tx, used, MSG_MORE);
                    used = 0;
                    off_t position = offset;
                    for (ssize_t sent; length && (sent = sendfile(s, image, &position, length)) > 0;)
                        length -= sent;
                } else {
                    if (pread(image, tx + used, length, offset) < 0)
                        return NULL;
                    used += length;
                }
                break;
            case WRITE: {
                size_t part = have - at < length ? have - at : length;
                const char *data = rx + at;
                if (part < length) {
                    memcpy(payload, rx + at, part);
                    take(s, payload + part, length - part);
                    data = payload;
                }
                at += part;
                if (pwrite(image, data, length, offset) < 0)
                    return NULL;
                used += header(tx + used, &r, structured, 0);
                break;
            }
            default:
                used += header(tx + used, &r, structured, 0);
            }
            if (used > FULL) {
                give(s, tx, used, 0);
                used = 0;
            }
        }
        give(s, tx, used, 0);
        memmove(rx, rx + at, have -= at);
    }
    close(s);
    free(rx), free(tx), free(payload);
    return NULL;
}

int main(int count, char **words)
{
    int on = 1, listener, buffer = 1 << 20;
    struct stat status;
    if (count < 3)
        return 2;
    writable = count > 3;
    image = open(words[2], writable ? O_RDWR : O_RDONLY);
    if (image < 0 || fstat(image, &status))
        return perror(words[2]), 1;
    size = status.st_size;
    if (words[1][0] == '/') {
        struct sockaddr_un name = {.sun_family = AF_UNIX};
        strncpy(name.sun_path, words[1], sizeof name.sun_path - 1);
        listener = socket(AF_UNIX, SOCK_STREAM, 0);
        if (bind(listener, (struct sockaddr *)&name, sizeof name))
            return perror(words[1]), 1;
    } else {
        struct sockaddr_in name = {AF_INET, htons(atoi(words[1])), {htonl(INADDR_LOOPBACK)}, {0}};
        listener = socket(AF_INET, SOCK_STREAM, 0);
        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(listener, (struct sockaddr *)&name, sizeof name))
            return perror(words[1]), 1;
    }
    listen(listener, 64);
    for (;;) {
        pthread_t thread;
        int s = accept(listener, NULL, NULL);
        if (words[1][0] == '/')
            setsockopt(s, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
        if (!pthread_create(&thread, NULL, serve, (void *)(intptr_t)s))
            pthread_detach(thread);
    }
}
