/*
 * Preloaded into a process of a test: reads of files whose path holds FAILING_PATH end with EIO, as on a disk
 * that is dying; and the wall clock is as many seconds off as the file named by CLOCK_OFFSET_FILE says.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static int fails(int descriptor)
{
    const char *wanted = getenv("FAILING_PATH");
    char name[64], path[4096];
    if (!wanted)
        return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return strstr(path, wanted) != NULL;
}

typedef ssize_t (*pread_call)(int, void *, size_t, off64_t);
typedef ssize_t (*preadv_call)(int, const struct iovec *, int, off64_t);
typedef ssize_t (*preadv2_call)(int, const struct iovec *, int, off64_t, int);
typedef int (*time_call)(struct timeval *, void *);

static int failed(int descriptor)
{
    if (!fails(descriptor))
        return 0;
    errno = EIO;
    return 1;
}

ssize_t pread64(int descriptor, void *buffer, size_t count, off64_t offset)
{
    if (failed(descriptor))
        return -1;
    return ((pread_call)dlsym(RTLD_NEXT, "pread64"))(descriptor, buffer, count, offset);
}

ssize_t preadv64(int descriptor, const struct iovec *parts, int count, off64_t offset)
{
    if (failed(descriptor))
        return -1;
    return ((preadv_call)dlsym(RTLD_NEXT, "preadv64"))(descriptor, parts, count, offset);
}

ssize_t preadv64v2(int descriptor, const struct iovec *parts, int count, off64_t offset, int flags)
{
    if (failed(descriptor))
        return -1;
    return ((preadv2_call)dlsym(RTLD_NEXT, "preadv64v2"))(descriptor, parts, count, offset, flags);
}

static time_t offset_seconds(void)
{
    const char *name = getenv("CLOCK_OFFSET_FILE");
    long seconds = 0;
    FILE *file = name ? fopen(name, "r") : NULL;
    if (file) {
        if (fscanf(file, "%ld", &seconds) != 1)
            seconds = 0;
        fclose(file);
    }
    return seconds;
}

int gettimeofday(struct timeval *now, void *zone)
{
    int result = ((time_call)dlsym(RTLD_NEXT, "gettimeofday"))(now, zone);
    now->tv_sec += offset_seconds();
    return result;
}
