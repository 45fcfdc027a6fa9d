// Which thread of a parallel region this is, and how many the next one will have.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}
inline int num_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}
