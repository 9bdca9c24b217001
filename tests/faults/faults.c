/* Storage and sockets that fail: loaded with LD_PRELOAD between a program and the C library.

Calls are matched by what they do (open, read, write, sync, rename, delete, mkdir, list, stat, lock,
truncate, map, connect, send, recv) and by the end of the path that they concern, which is what
/proc/self/fd says of a descriptor: "run/?.json" is any such file in a folder of this name. Sockets
are called "socket:store" (either end is the port given to `faults_store`) and "socket:peer".

Every call that is made to fail is recorded, and on request every other too, as a line of
seconds since 1970, phase, operation, error (0 where the call went through) and path, by tabs. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define RULES 16
#define LENGTH 4096
#define HANG -1

static struct rule {
    char operation[16], path[256];
    int error, after, times, matched;
} rules[RULES];
static int count, everything, record = -1, store;
static const char *phase = "before";
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Record to a file, and whether to record calls that go through as well. */
void faults_record(const char *path, int all) {
    record = syscall(SYS_openat, AT_FDCWD, path, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644);
    everything = all;
}

void faults_store(int port) { store = port; }

/* The name must last. */
void faults_phase(const char *name) { phase = name; }

/* From now on, let calls fail with an error number, or hang (-1; on a socket until the other end
   hangs up): the first `after` that match go through, the next `times` fail (0: all of them). */
void faults_add(const char *operation, const char *path, int error, int after, int times) {
    pthread_mutex_lock(&lock);
    struct rule *rule = &rules[count];
    snprintf(rule->operation, sizeof rule->operation, "%s", operation);
    snprintf(rule->path, sizeof rule->path, "%s", path);
    rule->error = error, rule->after = after, rule->times = times, rule->matched = 0;
    count += count < RULES - 1;
    pthread_mutex_unlock(&lock);
}

static void note(const char *operation, int error, const char *path) {
    char line[LENGTH + 100];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    int size = snprintf(line, sizeof line, "%lld.%06ld\t%s\t%s\t%d\t%s\n", (long long)now.tv_sec,
                        now.tv_nsec / 1000, phase, operation, error, path);
    if (record >= 0) syscall(SYS_write, record, line, size);
}

/* Whether a path ends as a pattern says, component by component. */
static int ends_as(const char *path, const char *pattern) {
    const char *tail = path + strlen(path);
    int slashes = 1;
    for (const char *at = pattern; *at; at++) slashes += *at == '/';
    while (tail > path && slashes)
        if (*--tail == '/') slashes--;
    return !fnmatch(pattern, *tail == '/' ? tail + 1 : tail, FNM_PATHNAME);
}

static int judge(const char *operation, const char *path) {
    int error = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < count && !error; i++) {
        struct rule *rule = &rules[i];
        if (strcmp(rule->operation, operation) || !ends_as(path, rule->path)) continue;
        int turn = rule->matched++ - rule->after;
        if (turn >= 0 && (!rule->times || turn < rule->times)) error = rule->error;
    }
    pthread_mutex_unlock(&lock);
    if (error || everything) note(operation, error, path);
    return error;
}

/* read and write on a socket are recv and send. */
static const char *of_socket(const char *operation) {
    if (!strcmp(operation, "read")) return "recv";
    return !strcmp(operation, "write") ? "send" : operation;
}

static void hang(void) {
    for (;;) pause();
}

/* A peer that says nothing is heard of again when it hangs up. */
static void await_end(int socket) {
    struct pollfd end = {.fd = socket, .events = POLLRDHUP};
    while (poll(&end, 1, -1) < 1) continue;
}

static int is_watched(void) { return count || everything; }

static void name_socket(int descriptor, char *name) {
    struct sockaddr_in6 near = {0}, far = {0};
    socklen_t size = sizeof near;
    getsockname(descriptor, (struct sockaddr *)&near, &size);
    size = sizeof far;
    getpeername(descriptor, (struct sockaddr *)&far, &size);
    /* A port lies at the same place in addresses of both families. */
    int ours = ntohs(near.sin6_port) == store || ntohs(far.sin6_port) == store;
    strcpy(name, ours ? "socket:store" : "socket:peer");
}

static void name_descriptor(int descriptor, char *name) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, name, LENGTH - 1);
    name[size < 0 ? 0 : size] = 0;
    if (!strncmp(name, "socket:", 7)) name_socket(descriptor, name);
}

/* Whether a call is to fail; errno says how. */
static int fails_on(const char *operation, int descriptor) {
    if (!is_watched() || descriptor < 0 || descriptor == record) return 0;
    char name[LENGTH];
    int before = errno;
    name_descriptor(descriptor, name);
    int is_socket = !strncmp(name, "socket:", 7);
    int error = judge(is_socket ? of_socket(operation) : operation, name);
    if (error == HANG && !is_socket) hang();
    if (error == HANG) await_end(descriptor), error = 0;
    errno = error ? error : before;
    return error;
}

static int fails_at(const char *operation, int folder, const char *path) {
    if (!is_watched() || !path) return 0;
    char name[2 * LENGTH] = "";
    int before = errno;
    if (*path != '/' && folder != AT_FDCWD) {
        name_descriptor(folder, name);
        strcat(name, "/");
    }
    strncat(name, path, LENGTH - 1);
    int error = judge(operation, name);
    if (error == HANG) hang();
    errno = error ? error : before;
    return error;
}

static int fails_to_connect(const struct sockaddr *address) {
    int has_port = address->sa_family == AF_INET || address->sa_family == AF_INET6;
    if (!is_watched() || !has_port) return 0;
    int port = ntohs(((const struct sockaddr_in *)address)->sin_port);
    int error = judge("connect", port == store ? "socket:store" : "socket:peer");
    if (error == HANG) hang();
    if (error) errno = error;
    return error;
}

/* A function of the C library, which fails where `condition` says so. Its name in here is another,
   so that it need not be declared as the headers do, which know open's mode as "...". */
#define WRAP(type, name, parameters, arguments, condition, failed)         \
    type faulty_##name parameters __asm__(#name);                          \
    type faulty_##name parameters {                                        \
        static type(*real) parameters;                                     \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);     \
        return (condition) ? (failed) : real arguments;                    \
    }
#define ON(what, type, name, parameters, arguments) \
    WRAP(type, name, parameters, arguments, fails_on(what, fd), -1)
#define AT(what, name, at, parameters, arguments) \
    WRAP(int, name, parameters, arguments, fails_at(what, at, path), -1)
#define BOTH(one, other, MAKE) MAKE(one) MAKE(other) /* 64 stands for files that are large */

#define OPEN(name)                                                                                 \
    AT("open", name, AT_FDCWD, (const char *path, int flags, mode_t mode), (path, flags, mode))
#define OPENAT(name)                                                                               \
    AT("open", name, at, (int at, const char *path, int flags, mode_t mode),                       \
        (at, path, flags, mode))
#define FOPEN(name)                                                                                \
    WRAP(FILE *, name, (const char *path, const char *mode),                                       \
        (path, mode), fails_at("open", AT_FDCWD, path), NULL)
BOTH(open, open64, OPEN)
BOTH(openat, openat64, OPENAT)
BOTH(fopen, fopen64, FOPEN)

#define PREAD(name)                                                                                \
    ON("read", ssize_t, name, (int fd, void *to, size_t n, off_t from), (fd, to, n, from))
#define PWRITE(name)                                                                               \
    ON("write", ssize_t, name, (int fd, const void *of, size_t n, off_t at), (fd, of, n, at))
ON("read", ssize_t, read, (int fd, void *to, size_t n), (fd, to, n))
ON("read", ssize_t, readv, (int fd, const void *to, int n), (fd, to, n))
BOTH(pread, pread64, PREAD)
#define PREADV(name)                                                                               \
    ON("read", ssize_t, name, (int fd, const void *to, int n, off_t from), (fd, to, n, from))
#define PREADV2(name)                                                                              \
    ON("read", ssize_t, name, (int fd, const void *to, int n, off_t from, int how),                \
        (fd, to, n, from, how))
BOTH(preadv, preadv64, PREADV)
BOTH(preadv2, preadv64v2, PREADV2)
ON("write", ssize_t, write, (int fd, const void *of, size_t n), (fd, of, n))
ON("write", ssize_t, writev, (int fd, const void *of, int n), (fd, of, n))
BOTH(pwrite, pwrite64, PWRITE)
ON("sync", int, fsync, (int fd), (fd))
ON("sync", int, fdatasync, (int fd), (fd))

AT("rename", rename, AT_FDCWD, (const char *path, const char *to), (path, to))
AT("rename", renameat, at, (int at, const char *path, int into, const char *to),
    (at, path, into, to))
AT("delete", unlink, AT_FDCWD, (const char *path), (path))
AT("delete", rmdir, AT_FDCWD, (const char *path), (path))
AT("delete", unlinkat, at, (int at, const char *path, int flags), (at, path, flags))
AT("mkdir", mkdir, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
WRAP(DIR *, opendir, (const char *path), (path), fails_at("list", AT_FDCWD, path), NULL)
WRAP(DIR *, fdopendir, (int fd), (fd), fails_on("list", fd), NULL)
#define READDIR(name)                                                                              \
    WRAP(void *, name, (DIR *folder), (folder), fails_on("list", dirfd(folder)), NULL)
BOTH(readdir, readdir64, READDIR)

/* fstat is left alone: Python asks it of all files that it opens, and goes on without an answer. */
#define STAT(name) AT("stat", name, AT_FDCWD, (const char *path, void *to), (path, to))
#define FSTATAT(name)                                                                              \
    AT("stat", name, at, (int at, const char *path, void *to, int flags), (at, path, to, flags))
BOTH(stat, stat64, STAT)
BOTH(lstat, lstat64, STAT)
BOTH(fstatat, fstatat64, FSTATAT)
AT("stat", statx, at, (int at, const char *path, int flags, unsigned mask, void *to),
    (at, path, flags, mask, to))
/* What programs built for a C library before 2.33 call. */
#define XSTAT(name)                                                                                \
    AT("stat", name, AT_FDCWD, (int version, const char *path, void *to), (version, path, to))
BOTH(__xstat, __xstat64, XSTAT)
BOTH(__lxstat, __lxstat64, XSTAT)

#define TRUNCATE(name) AT("truncate", name, AT_FDCWD, (const char *path, off_t size), (path, size))
#define FTRUNCATE(name) ON("truncate", int, name, (int fd, off_t size), (fd, size))
BOTH(truncate, truncate64, TRUNCATE)
BOTH(ftruncate, ftruncate64, FTRUNCATE)
ON("lock", int, flock, (int fd, int how), (fd, how))
#define MMAP(name)                                                                              \
    WRAP(void *, name, (void *at, size_t n, int may, int flags, int fd, off_t from),            \
         (at, n, may, flags, fd, from), !(flags & MAP_ANONYMOUS) && fails_on("map", fd), MAP_FAILED)
BOTH(mmap, mmap64, MMAP)

WRAP(int, connect, (int fd, const struct sockaddr *to, socklen_t n),
    (fd, to, n), fails_to_connect(to), -1)
ON("send", ssize_t, send, (int fd, const void *of, size_t n, int flags), (fd, of, n, flags))
ON("send", ssize_t, sendmsg, (int fd, const struct msghdr *of, int flags), (fd, of, flags))
ON("recv", ssize_t, recv, (int fd, void *to, size_t n, int flags), (fd, to, n, flags))
ON("recv", ssize_t, recvmsg, (int fd, struct msghdr *to, int flags), (fd, to, flags))
