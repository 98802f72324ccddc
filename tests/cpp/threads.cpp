// QEMB_TEST_THREADS: the threads of a test program, however many cores the machine has.
#include <cstdlib>

#include "cpu/parallel.h"

[[maybe_unused]] static const bool is_set = [] {
    const char* count = std::getenv("QEMB_TEST_THREADS");
    if (count) qemb::cpu::set_num_threads(std::atoi(count));
    return count != nullptr;
}();
