// Memory of large results. What a freed tensor leaves is kept and handed out again: the system gives memory page by
// page and zeroed, which takes longer than most ops that write it.
#pragma once

#include <cstddef>

namespace qemb::cpu {

// At least `bytes`, aligned to a page, contents undefined. Throws std::bad_alloc. take and give_back may be called from
// any thread.
void* take_block(size_t bytes);
void give_back_block(void* block);

// Blocks in use and kept never add up to more than were in use at once, and a quarter of the machine's memory is kept
// at most.
size_t kept_bytes();
void release_kept();  // to the system; what was in use at once is counted anew

}  // namespace qemb::cpu
