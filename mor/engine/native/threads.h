/* The threads of a parallel region: one without OpenMP. */

#ifdef _OPENMP
#include <omp.h>
#define own_number omp_get_thread_num
#define num_parts omp_get_num_threads
#else
#define own_number() 0
#define num_parts() 1
#endif
