/* Preloaded into a process, this writes down which files below $POWER_CUT_ROOT it changes and forces to disk, in order,
   one line a call into $POWER_CUT_LOG: the call, a tab, the path, and for calls with two paths a tab and the second.
   With $POWER_CUT_KEPT, a folder, the content that a file has after a call on it is copied there, and its number follows.
   Nothing is changed: every call goes on to the C library. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void path_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    out[length > 0 ? length : 0] = 0;
}

static void path_at(int directory, const char *name, char *out) {
    char base[PATH_MAX];
    if (name[0] == '/') {
        snprintf(out, PATH_MAX, "%s", name);
        return;
    }
    if (directory != AT_FDCWD) path_of(directory, base);
    else if (!getcwd(base, sizeof base)) base[0] = 0;
    snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, name);
}

/* Copies what an open file holds now; the number of the copy, 0 for none. */
static int keep(int fd) {
    static int copies = 0;
    const char *folder = getenv("POWER_CUT_KEPT");
    struct stat facts;
    char name[PATH_MAX], data[65536];
    ssize_t size;
    if (!folder || fstat(fd, &facts) || !S_ISREG(facts.st_mode)) return 0;
    int number = __atomic_add_fetch(&copies, 1, __ATOMIC_SEQ_CST);
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    int in = syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC);
    if (in < 0) { /* unlinked, or not to be read */
        if (errno == ENOENT) return 0;
        abort();
    }
    snprintf(name, sizeof name, "%.2000s/%d", folder, number);
    int out = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (out < 0) abort();
    while ((size = syscall(SYS_read, in, data, sizeof data)) > 0)
        if (syscall(SYS_write, out, data, (size_t)size) != size) abort();
    syscall(SYS_close, in);
    syscall(SYS_close, out);
    return number;
}

static void note(const char *call, const char *one, const char *two, int fd) {
    const char *root = getenv("POWER_CUT_ROOT"), *log = getenv("POWER_CUT_LOG");
    int before = errno;
    if (root && log && (!strncmp(one, root, strlen(root)) || (two && !strncmp(two, root, strlen(root))))) {
        char line[3 * PATH_MAX];
        char kept[16] = "";
        int number = fd < 0 ? 0 : keep(fd);
        if (number) snprintf(kept, sizeof kept, "%d", number);
        int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%s\n", call, one, two ? two : "", kept);
        int to = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
        if (to < 0 || syscall(SYS_write, to, line, (size_t)length) != length) abort();
        syscall(SYS_close, to);
    }
    errno = before;
}

static void note_fd(const char *call, int fd) {
    char path[PATH_MAX];
    path_of(fd, path);
    note(call, path, NULL, fd);
}

#define ON_FILE(call, type, name, parameters, arguments, fd) \
    type name parameters { type answer = NEXT(name) arguments; if (answer >= 0) note_fd(call, fd); return answer; }

ON_FILE("sync", int, fsync, (int fd), (fd), fd)
ON_FILE("sync", int, fdatasync, (int fd), (fd), fd)
ON_FILE("write", ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), fd)
ON_FILE("write", ssize_t, writev, (int fd, const struct iovec *data, int count), (fd, data, count), fd)
ON_FILE("write", ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), fd)
ON_FILE("write", ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), fd)
ON_FILE("write", ssize_t, sendfile, (int fd, int in, off_t *at, size_t size), (fd, in, at, size), fd)
ON_FILE("write", ssize_t, sendfile64, (int fd, int in, off64_t *at, size_t size), (fd, in, at, size), fd)
ON_FILE("write", int, ftruncate, (int fd, off_t size), (fd, size), fd)
ON_FILE("write", int, ftruncate64, (int fd, off64_t size), (fd, size), fd)

#define ON_PATH(call, name, parameters, arguments, directory, file) \
    int name parameters { \
        char path[PATH_MAX]; \
        path_at(directory, file, path); \
        int answer = NEXT(name) arguments; \
        if (answer == 0) note(call, path, NULL, -1); \
        return answer; }

ON_PATH("mkdir", mkdir, (const char *a, mode_t mode), (a, mode), AT_FDCWD, a)
ON_PATH("unlink", unlink, (const char *a), (a), AT_FDCWD, a)
ON_PATH("unlink", unlinkat, (int d, const char *a, int f), (d, a, f), d, a)

#define ON_PATHS(call, name, parameters, arguments, from_at, from, to_at, to) \
    int name parameters { \
        char one[PATH_MAX], two[PATH_MAX]; \
        path_at(from_at, from, one); path_at(to_at, to, two); \
        int answer = NEXT(name) arguments; \
        if (answer == 0) note(call, one, two, -1); \
        return answer; }

ON_PATHS("rename", rename, (const char *a, const char *b), (a, b), AT_FDCWD, a, AT_FDCWD, b)
ON_PATHS("rename", renameat, (int d, const char *a, int e, const char *b), (d, a, e, b), d, a, e, b)
ON_PATHS("link", link, (const char *a, const char *b), (a, b), AT_FDCWD, a, AT_FDCWD, b)
ON_PATHS("link", linkat, (int d, const char *a, int e, const char *b, int f), (d, a, e, b, f), d, a, e, b)
