/* A disk on which each fdatasync takes NANOSECONDS longer: preloaded into the server by slow_fsync.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

int fdatasync(int descriptor)
{
    static int (*real)(int);
    struct timespec rest = {NANOSECONDS / 1000000000L, NANOSECONDS % 1000000000L};

    if (!real)
        real = (int (*)(int)) dlsym(RTLD_NEXT, "fdatasync");
    nanosleep(&rest, 0);
    return real(descriptor);
}
