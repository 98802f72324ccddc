/* Preloaded before the C library. It watches the calls that read or change what lies in a folder: it counts them, lets
 * the k-th one fail or sends a signal before it, limits the bytes that can be written, or records all changes for
 * power.py. Armed from Python by ctypes, in a child that is forked for each case. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { kWrites = 1, kReads = 2 };

static char folder[PATH_MAX], place[PATH_MAX]; /* place: of the call that failed */
static int watched, fault;                     /* fault: 0 counts only, -N sends signal N, otherwise the errno */
static long at, calls, space = -1;
static int record = -1; /* the descriptor of the record */
static char names[1 << 20]; /* of the calls, separated by spaces */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void fault_arm(const char* path, int what, int kind, long number) {
    snprintf(folder, sizeof folder, "%s", path);
    watched = what;
    fault = kind;
    at = number;
    calls = 0;
    names[0] = place[0] = 0;
}
void fault_space(long bytes) { space = bytes; } /* -1: as much as the disk has */
void fault_record(int descriptor) { record = descriptor; }
long fault_calls(void) { return calls; }
const char* fault_names(void) { return names; }
const char* fault_place(void) { return place; }

static int inside(const char* path) {
    const size_t size = strlen(folder);
    return size && strncmp(path, folder, size) == 0 && (path[size] == '/' || path[size] == 0);
}
/* The path of a descriptor; 0 if it is not in the folder. */
static int of_descriptor(int descriptor, char* path) {
    char link[64];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const int before = errno;
    const ssize_t size = readlink(link, path, PATH_MAX - 1);
    errno = before;
    if (size < 0) return 0;
    path[size] = 0;
    return inside(path);
}
/* The absolute form of a path that is relative to a folder's descriptor; 0 if it is not in the folder. */
static int of_path(int where, const char* given, char* path) {
    if (!folder[0] || given == NULL) return 0;
    if (given[0] == '/') {
        snprintf(path, PATH_MAX, "%s", given);
        return inside(path);
    }
    char start[PATH_MAX];
    const int before = errno;
    const int known = where == AT_FDCWD ? getcwd(start, sizeof start) != NULL : (of_descriptor(where, start), 1);
    errno = before;
    if (!known) return 0;
    if (snprintf(path, PATH_MAX, "%s/%s", start, given) >= PATH_MAX) return 0;
    return inside(path);
}
/* 1: the call must fail, errno is set. */
static int fails(const char* name, int kind, const char* path) {
    if (!(watched & kind)) return 0;
    const int before = errno;
    pthread_mutex_lock(&lock);
    if (!fault) {
        const size_t used = strlen(names);
        if (used + strlen(name) + 2 < sizeof names) sprintf(names + used, "%s ", name);
    }
    const int hit = calls++ == at && fault;
    pthread_mutex_unlock(&lock);
    errno = before;
    if (!hit) return 0;
    snprintf(place, sizeof place, "%s", path);
    if (fault < 0) {
        raise(-fault);
        return 0;
    }
    errno = fault;
    return 1;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define CHECK(name, kind, affected) \
    char path_[PATH_MAX]; \
    const int affected_ = (affected); \
    if (affected_ && fails(name, kind, path_)) return -1
#define TO(descriptor) of_descriptor(descriptor, path_)
#define AT(where, path) of_path(where, path, path_)

/* A line of the record: the call, its numbers, the paths; then `size` bytes. */
static void note(const char* call, long number, const char* first, const char* second, const void* data, size_t size) {
    if (record < 0) return;
    char line[3 * PATH_MAX];
    const int before = errno;
    const int length = snprintf(line, sizeof line, "%s\t%ld\t%zu\t%s\t%s\n", call, number, size, first, second);
    ssize_t (*const real)(int, const void*, size_t) = REAL(ssize_t, write, int, const void*, size_t);
    pthread_mutex_lock(&lock);
    if (real(record, line, (size_t)length) != length) abort();
    for (size_t done = 0; done < size;) {
        const ssize_t wrote = real(record, (const char*)data + done, size - done);
        if (wrote <= 0) abort();
        done += (size_t)wrote;
    }
    pthread_mutex_unlock(&lock);
    errno = before;
}
/* Take the bytes that fit; -1 and ENOSPC if none does. */
static ssize_t fit(size_t size) {
    if (space < 0 || size == 0) return (ssize_t)size;
    if (space == 0) {
        errno = ENOSPC;
        return -1;
    }
    const ssize_t taken = (long)size < space ? (ssize_t)size : space;
    space -= taken;
    return taken;
}

static int writes(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); }
static void note_open(int done, const char* path, int flags, int existed) {
    if (done < 0 || record < 0) return;
    if (!existed) note("create", 0, path, "", NULL, 0);
    else if (flags & O_TRUNC) note("truncate", 0, path, "", NULL, 0);
}
#define OPEN_BODY(where, call) \
    va_list more; \
    va_start(more, flags); \
    const mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0; \
    va_end(more); \
    CHECK("open", writes(flags) ? kWrites : kReads, AT(where, path)); \
    const int watch = affected_ && writes(flags) && record >= 0; \
    const int existed = watch && access(path_, F_OK) == 0; \
    const int done = call; \
    if (watch) note_open(done, path_, flags, existed); \
    return done;
#define OPEN(name) \
    int name(const char* path, int flags, ...) { \
        OPEN_BODY(AT_FDCWD, REAL(int, name, const char*, int, ...)(path, flags, mode)) \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int where, const char* path, int flags, ...) { \
        OPEN_BODY(where, REAL(int, name, int, const char*, int, ...)(where, path, flags, mode)) \
    }
OPENAT(openat)
OPENAT(openat64)

#define READ(name, ...) \
    CHECK("read", kReads, TO(from)); \
    return REAL(ssize_t, name, __VA_ARGS__)
ssize_t read(int from, void* data, size_t size) { READ(read, int, void*, size_t)(from, data, size); }
ssize_t readv(int from, const struct iovec* data, int count) {
    READ(readv, int, const struct iovec*, int)(from, data, count);
}
ssize_t pread(int from, void* data, size_t size, off_t offset) {
    READ(pread, int, void*, size_t, off_t)(from, data, size, offset);
}
ssize_t pread64(int from, void* data, size_t size, off64_t offset) {
    READ(pread64, int, void*, size_t, off64_t)(from, data, size, offset);
}
#define MMAP(name, type) \
    void* name(void* address, size_t size, int protection, int flags, int from, type offset) { \
        char path[PATH_MAX]; \
        if (from >= 0 && of_descriptor(from, path) && fails("mmap", kReads, path)) return MAP_FAILED; \
        return REAL(void*, name, void*, size_t, int, int, int, type)(address, size, protection, flags, from, offset); \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)
DIR* opendir(const char* path) {
    char path_[PATH_MAX];
    if (AT(AT_FDCWD, path) && fails("opendir", kReads, path_)) return NULL;
    return REAL(DIR*, opendir, const char*)(path);
}

static off64_t position(int to) {
    struct stat64 about;
    if (record < 0) return 0;
    return fcntl(to, F_GETFL) & O_APPEND && fstat64(to, &about) == 0 ? about.st_size : lseek64(to, 0, SEEK_CUR);
}
#define WRITTEN(offset, call) \
    const ssize_t fitting = affected_ ? fit(size) : (ssize_t)size; \
    if (fitting < 0) return -1; \
    const off64_t start = affected_ ? (offset) : 0; \
    const ssize_t done = call; \
    if (affected_ && done > 0) note("write", start, path_, "", data, (size_t)done); \
    return done;
ssize_t write(int to, const void* data, size_t size) {
    CHECK("write", kWrites, TO(to));
    WRITTEN(position(to), REAL(ssize_t, write, int, const void*, size_t)(to, data, (size_t)fitting))
}
ssize_t pwrite(int to, const void* data, size_t size, off_t offset) {
    CHECK("write", kWrites, TO(to));
    WRITTEN(offset, REAL(ssize_t, pwrite, int, const void*, size_t, off_t)(to, data, (size_t)fitting, offset))
}
ssize_t pwrite64(int to, const void* data, size_t size, off64_t offset) {
    CHECK("write", kWrites, TO(to));
    WRITTEN(offset, REAL(ssize_t, pwrite64, int, const void*, size_t, off64_t)(to, data, (size_t)fitting, offset))
}
ssize_t writev(int to, const struct iovec* data, int count) {
    char path[PATH_MAX];
    if ((space < 0 && record < 0) || !of_descriptor(to, path)) {
        CHECK("write", kWrites, TO(to));
        return REAL(ssize_t, writev, int, const struct iovec*, int)(to, data, count);
    }
    ssize_t total = 0;
    for (int i = 0; i < count; ++i) {
        const ssize_t done = write(to, data[i].iov_base, data[i].iov_len);
        if (done < 0) return total ? total : -1;
        total += done;
        if ((size_t)done < data[i].iov_len) break;
    }
    return total;
}
/* The callers copy by read and write when the disk cannot copy, so that the bytes are counted and recorded. */
#define COPIES(to) \
    CHECK("write", kWrites, TO(to)); \
    if (affected_ && (space >= 0 || record >= 0)) { \
        errno = EINVAL; \
        return -1; \
    }
ssize_t sendfile64(int to, int from, off64_t* offset, size_t size) {
    COPIES(to)
    return REAL(ssize_t, sendfile64, int, int, off64_t*, size_t)(to, from, offset, size);
}
ssize_t copy_file_range(int from, off64_t* start, int to, off64_t* offset, size_t size, unsigned flags) {
    COPIES(to)
    return REAL(ssize_t, copy_file_range, int, off64_t*, int, off64_t*, size_t, unsigned)(from, start, to, offset,
                                                                                         size, flags);
}

#define DONE(type, ...) /* a call that returns 0 if it succeeds */ \
    const int done = __VA_ARGS__; \
    if (done == 0 && affected_) note(type, 0, path_, "", NULL, 0); \
    return done;
int fsync(int descriptor) {
    CHECK("fsync", kWrites, TO(descriptor));
    DONE("sync", REAL(int, fsync, int)(descriptor))
}
int fdatasync(int descriptor) {
    CHECK("fsync", kWrites, TO(descriptor));
    DONE("sync", REAL(int, fdatasync, int)(descriptor))
}
#define TRUNCATED(call) \
    const int done = call; \
    if (done == 0 && affected_) note("truncate", (long)size, path_, "", NULL, 0); \
    return done;
int ftruncate(int descriptor, off_t size) {
    CHECK("truncate", kWrites, TO(descriptor));
    TRUNCATED(REAL(int, ftruncate, int, off_t)(descriptor, size))
}
int ftruncate64(int descriptor, off64_t size) {
    CHECK("truncate", kWrites, TO(descriptor));
    TRUNCATED(REAL(int, ftruncate64, int, off64_t)(descriptor, size))
}
#define RENAMED(call) \
    char source[PATH_MAX]; \
    const int from_inside = of_path(from_where, from, source); \
    const int done = call; \
    if (done == 0 && affected_ && from_inside) \
        note(flags & RENAME_EXCHANGE ? "exchange" : "rename", 0, source, path_, NULL, 0); \
    return done;
int rename(const char* from, const char* to) {
    CHECK("rename", kWrites, AT(AT_FDCWD, to));
    const int from_where = AT_FDCWD, flags = 0;
    RENAMED(REAL(int, rename, const char*, const char*)(from, to))
}
int renameat2(int from_where, const char* from, int to_where, const char* to, unsigned flags) {
    CHECK("rename", kWrites, AT(to_where, to));
    RENAMED(REAL(int, renameat2, int, const char*, int, const char*, unsigned)(from_where, from, to_where, to, flags))
}
int unlink(const char* path) {
    CHECK("unlink", kWrites, AT(AT_FDCWD, path));
    DONE("unlink", REAL(int, unlink, const char*)(path))
}
int unlinkat(int where, const char* path, int flags) {
    CHECK("unlink", kWrites, AT(where, path));
    DONE("unlink", REAL(int, unlinkat, int, const char*, int)(where, path, flags))
}
int rmdir(const char* path) {
    CHECK("unlink", kWrites, AT(AT_FDCWD, path));
    DONE("unlink", REAL(int, rmdir, const char*)(path))
}
int mkdir(const char* path, mode_t mode) {
    CHECK("mkdir", kWrites, AT(AT_FDCWD, path));
    DONE("mkdir", REAL(int, mkdir, const char*, mode_t)(path, mode))
}
int mkdirat(int where, const char* path, mode_t mode) {
    CHECK("mkdir", kWrites, AT(where, path));
    DONE("mkdir", REAL(int, mkdirat, int, const char*, mode_t)(where, path, mode))
}
int chmod(const char* path, mode_t mode) {
    CHECK("chmod", kWrites, AT(AT_FDCWD, path));
    return REAL(int, chmod, const char*, mode_t)(path, mode);
}
int symlink(const char* target, const char* path) {
    CHECK("symlink", kWrites, AT(AT_FDCWD, path));
    return REAL(int, symlink, const char*, const char*)(target, path);
}
