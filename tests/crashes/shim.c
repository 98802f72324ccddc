/* Preloaded before the C library: counts the calls that change what lies in a folder, and lets the k-th one fail, or
 * kills the process before it. Armed from Python by ctypes, in a child that is forked for each k. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static int fault; /* 0: count only, -1: SIGKILL, otherwise the errno */
static long at, calls;
static char names[1 << 20]; /* of the calls, separated by spaces */

void fault_arm(const char* path, int kind, long number) {
    snprintf(folder, sizeof folder, "%s", path);
    fault = kind;
    at = number;
    calls = 0;
    names[0] = 0;
}
long fault_calls(void) { return calls; }
const char* fault_names(void) { return names; }

static int inside(const char* path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }
static int of_descriptor(int descriptor) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return inside(path);
}
static int of_path(int where, const char* path) {
    if (!folder[0]) return 0;
    if (path[0] == '/') return inside(path);
    if (where != AT_FDCWD) return of_descriptor(where);
    char here[PATH_MAX];
    return getcwd(here, sizeof here) != NULL && inside(here);
}
/* 1: the call must fail, errno is set. */
static int fails(const char* name) {
    const int before = errno;
    if (!fault) {
        const size_t used = strlen(names);
        if (used + strlen(name) + 2 < sizeof names) sprintf(names + used, "%s ", name);
    }
    if (calls++ != at || !fault) {
        errno = before;
        return 0;
    }
    if (fault == -1) raise(SIGKILL);
    errno = fault;
    return 1;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define CHECK(name, affected) \
    if ((affected) && fails(name)) return -1

static int writes(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); }
#define OPEN(name) \
    int name(const char* path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        CHECK("open", writes(flags) && of_path(AT_FDCWD, path)); \
        return REAL(int, name, const char*, int, ...)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int where, const char* path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        CHECK("open", writes(flags) && of_path(where, path)); \
        return REAL(int, name, int, const char*, int, ...)(where, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int to, const void* data, size_t size) {
    CHECK("write", of_descriptor(to));
    return REAL(ssize_t, write, int, const void*, size_t)(to, data, size);
}
ssize_t writev(int to, const struct iovec* data, int count) {
    CHECK("write", of_descriptor(to));
    return REAL(ssize_t, writev, int, const struct iovec*, int)(to, data, count);
}
ssize_t pwrite(int to, const void* data, size_t size, off_t offset) {
    CHECK("write", of_descriptor(to));
    return REAL(ssize_t, pwrite, int, const void*, size_t, off_t)(to, data, size, offset);
}
ssize_t pwrite64(int to, const void* data, size_t size, off64_t offset) {
    CHECK("write", of_descriptor(to));
    return REAL(ssize_t, pwrite64, int, const void*, size_t, off64_t)(to, data, size, offset);
}
ssize_t sendfile64(int to, int from, off64_t* offset, size_t size) {
    CHECK("write", of_descriptor(to));
    return REAL(ssize_t, sendfile64, int, int, off64_t*, size_t)(to, from, offset, size);
}
ssize_t copy_file_range(int from, off64_t* start, int to, off64_t* offset, size_t size, unsigned flags) {
    CHECK("write", of_descriptor(to));
    return REAL(ssize_t, copy_file_range, int, off64_t*, int, off64_t*, size_t, unsigned)(from, start, to, offset,
                                                                                         size, flags);
}
int fsync(int descriptor) {
    CHECK("fsync", of_descriptor(descriptor));
    return REAL(int, fsync, int)(descriptor);
}
int fdatasync(int descriptor) {
    CHECK("fsync", of_descriptor(descriptor));
    return REAL(int, fdatasync, int)(descriptor);
}
int ftruncate(int descriptor, off_t size) {
    CHECK("truncate", of_descriptor(descriptor));
    return REAL(int, ftruncate, int, off_t)(descriptor, size);
}
int ftruncate64(int descriptor, off64_t size) {
    CHECK("truncate", of_descriptor(descriptor));
    return REAL(int, ftruncate64, int, off64_t)(descriptor, size);
}
int rename(const char* from, const char* to) {
    CHECK("rename", of_path(AT_FDCWD, to));
    return REAL(int, rename, const char*, const char*)(from, to);
}
int renameat2(int from_where, const char* from, int to_where, const char* to, unsigned flags) {
    CHECK("rename", of_path(to_where, to));
    return REAL(int, renameat2, int, const char*, int, const char*, unsigned)(from_where, from, to_where, to, flags);
}
int unlink(const char* path) {
    CHECK("unlink", of_path(AT_FDCWD, path));
    return REAL(int, unlink, const char*)(path);
}
int unlinkat(int where, const char* path, int flags) {
    CHECK("unlink", of_path(where, path));
    return REAL(int, unlinkat, int, const char*, int)(where, path, flags);
}
int rmdir(const char* path) {
    CHECK("unlink", of_path(AT_FDCWD, path));
    return REAL(int, rmdir, const char*)(path);
}
int mkdir(const char* path, mode_t mode) {
    CHECK("mkdir", of_path(AT_FDCWD, path));
    return REAL(int, mkdir, const char*, mode_t)(path, mode);
}
int mkdirat(int where, const char* path, mode_t mode) {
    CHECK("mkdir", of_path(where, path));
    return REAL(int, mkdirat, int, const char*, mode_t)(where, path, mode);
}
int chmod(const char* path, mode_t mode) {
    CHECK("chmod", of_path(AT_FDCWD, path));
    return REAL(int, chmod, const char*, mode_t)(path, mode);
}
int symlink(const char* target, const char* path) {
    CHECK("symlink", of_path(AT_FDCWD, path));
    return REAL(int, symlink, const char*, const char*)(target, path);
}
