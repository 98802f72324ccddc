// Bank conflicts of 16-byte accesses to shared memory: 32 banks of 4 bytes, so that 8 lanes are served at a time when
// their addresses fall into different sixteenths of 128 bytes, or into the same 16 bytes.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace emulator {

struct Counters {
    uint64_t ldmatrix = 0, bank_conflicts = 0;   // 8 x 8 matrices that ldmatrix read, and passes beyond one for each
    uint64_t vectors = 0, vector_conflicts = 0;  // quarter-warps of load16 and store16, and passes beyond one for each
    uint64_t mma = 0, wgmma = 0;                 // products of a warp, of a warpgroup
    uint64_t tickets = 0;
};
inline Counters& counters() {
    static Counters counters;
    return counters;
}

// Passes beyond the first over the addresses of 8 lanes; kNoAddress takes part in none.
inline constexpr uint32_t kNoAddress = ~0u;
inline uint64_t conflicts(const uint32_t* address) {
    uint8_t distinct[8] = {};
    uint8_t most = 1;
    for (int i = 0; i < 8; ++i) {
        bool fresh = address[i] != kNoAddress;
        for (int j = 0; j < i; ++j) fresh = fresh && address[j] != address[i];
        if (!fresh) continue;
        uint8_t& count = distinct[address[i] / 16 % 8];
        if (++count > most) most = count;
    }
    return most - 1u;
}

// Lanes run one after another: the n-th access of each since the warp last acted together is taken for one instruction.
class VectorAccesses {
  public:
    void add(int lane, const char* file, int line, uint32_t address) {
        const size_t n = next_[static_cast<size_t>(lane)]++;
        if (n == used_) {
            if (used_ == all_.size()) all_.emplace_back();
            all_[used_] = {file, line, {}};
            all_[used_++].address.fill(kNoAddress);
        }
        if (all_[n].file == file && all_[n].line == line) all_[n].address[static_cast<size_t>(lane)] = address;
    }
    void count() {
        for (size_t n = 0; n < used_; ++n) {
            for (int quarter = 0; quarter < 4; ++quarter) {
                ++counters().vectors;
                counters().vector_conflicts += conflicts(all_[n].address.data() + 8 * quarter);
            }
        }
        if (used_) next_ = {};
        used_ = 0;
    }

  private:
    struct Access {
        const char* file;
        int line;
        std::array<uint32_t, 32> address;
    };
    std::vector<Access> all_;
    size_t used_ = 0;
    std::array<uint32_t, 32> next_{};
};

}  // namespace emulator
