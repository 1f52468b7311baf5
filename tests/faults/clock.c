/* Steps the clock that Python sees: a library for LD_PRELOAD.

   The file named by STEMTUNE_CLOCK holds a number of seconds (int64), which is added to what the real-time clock tells
   the interpreter. Native code keeps the real clock: it hands moments to
   the kernel, as the end of a wait for instance, and the kernel's clock is not stepped. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static int64_t none;
static volatile int64_t *step = &none;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("STEMTUNE_CLOCK");
    int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    if (file < 0)
        return;
    void *page = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (page != MAP_FAILED)
        step = page;
}

static int from_python(void *address) {
    Dl_info caller;
    if (!*step || !dladdr(address, &caller) || !caller.dli_fname)
        return 0;
    const char *name = strrchr(caller.dli_fname, '/');
    name = name ? name + 1 : caller.dli_fname;
    return !strncmp(name, "libpython", 9) || !strncmp(name, "python", 6);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!real)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME && from_python(__builtin_return_address(0)))
        now->tv_sec += *step;
    return failed;
}

time_t time(time_t *told) {
    struct timespec now;
    if (!real)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    real(CLOCK_REALTIME, &now);
    if (from_python(__builtin_return_address(0)))
        now.tv_sec += *step;
    if (told)
        *told = now.tv_sec;
    return now.tv_sec;
}
