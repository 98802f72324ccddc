// The copy engine: boxes of tensors of up to four dimensions between global and shared memory, the latter in rows of
// 128 bytes whose eight chunks are permuted (chunk c of row r at c ^ r % 8, r counted from address 0) where the map
// says so.
#pragma once

#include "emulator/mbarrier.h"
#include "emulator/numbers.h"

namespace emulator {

inline uint32_t swizzle128(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

}  // namespace emulator

namespace qemb::cuda {

// By our reading of cuTensorMapEncodeTiled. Dimension 0 is contiguous; strides in bytes; a box beyond the tensor holds
// zeros.
struct alignas(64) TensorMap {
    char* base;
    int64_t size[4], stride[4];
    int32_t box[4];
    int32_t rank, element;
    bool swizzled, is_float;
};

}  // namespace qemb::cuda

namespace emulator {

using qemb::cuda::TensorMap;

// Where a box begins: as many coordinates as the map has dimensions, from the contiguous one on.
struct Corner {
    int at[4] = {};
    int rank;

    template <int kRank>
    Corner(const int (&coordinates)[kRank]) : rank(kRank) {
        std::copy(coordinates, coordinates + kRank, at);
    }
};

// visit(global address or null, shared address, bytes) for every 16 bytes of a box, and fewer where the tensor ends
// within them.
template <class Visit>
void each_chunk(const TensorMap& map, uint32_t shared, const Corner& corner, Visit visit) {
    const int (&at)[4] = corner.at;
    const int row_bytes = map.box[0] * map.element;
    for (int i3 = 0, row = 0; i3 < map.box[3]; ++i3)
        for (int i2 = 0; i2 < map.box[2]; ++i2)
            for (int i1 = 0; i1 < map.box[1]; ++i1, ++row) {
                const int64_t i[4] = {at[0], at[1] + int64_t(i1), at[2] + int64_t(i2), at[3] + int64_t(i3)};
                bool inside = true;
                char* from = map.base;
                for (int d = 1; d < 4; ++d) {
                    inside = inside && i[d] >= 0 && i[d] < map.size[d];
                    from += i[d] * map.stride[d];
                }
                for (int byte = 0; byte < row_bytes; byte += 16) {
                    uint32_t to = shared + static_cast<uint32_t>(row * row_bytes + byte);
                    if (map.swizzled) to = swizzle128(to);
                    const int64_t first = i[0] * map.element + byte, end = map.size[0] * map.element;
                    visit(inside ? from + first : nullptr, to, std::max<int64_t>(0, -first),
                          std::min<int64_t>(16, end - first));
                }
            }
}

inline int box_bytes(const TensorMap& map) { return map.box[0] * map.box[1] * map.box[2] * map.box[3] * map.element; }

inline void check_copy(const TensorMap& map, const Corner& corner, uint32_t shared, const Place& place) {
    if (map.rank != corner.rank) fail(place.text() + ": the map has " + std::to_string(map.rank) + " dimensions");
    if (shared % (map.swizzled ? 1024 : 128))
        fail(place.text() + ": misaligned shared address " + std::to_string(shared));
}

// Where a copy will land: who reads there early must not get what was there.
inline void forget(uint32_t to, uint32_t bytes, const Place& place) {
    char* const target = Block::current()->touch_async(to, bytes, place);
    if (Races::on) races().access(target, bytes, true);
    std::memset(target, 0xff, bytes);
}

inline void tensor_load(const TensorMap& map, const Corner& corner, uint32_t shared, uint32_t barrier,
                        const Place& place) {
    Block& block = *Block::current();
    check_copy(map, corner, shared, place);
    each_chunk(map, shared, corner, [&](char* from, uint32_t to, int64_t begin, int64_t end) {
        if (Races::on && from && begin < end) races().access(from + begin, static_cast<size_t>(end - begin), false);
        forget(to, 16, place);
    });
    mbarrier_at(barrier, place);
    const Clock issued = Races::on ? races().release(running->warp) : Clock{};
    block.submit([=] {
        each_chunk(map, shared, corner, [&](char* from, uint32_t to, int64_t begin, int64_t end) {
            char* target = Block::current()->touch_async(to, 16, place);
            std::memset(target, 0, 16);
            if (from && begin < end) std::memcpy(target + begin, from + begin, static_cast<size_t>(end - begin));
        });
        mbarrier_complete(barrier, box_bytes(map), issued, place);
    });
}

inline void write_out(char* to, const char* from, int64_t bytes, bool add) {
    for (int64_t i = 0; add && i < bytes; i += 4) {
        float sum, more;
        std::memcpy(&sum, to + i, 4);
        std::memcpy(&more, from + i, 4);
        sum += more;
        std::memcpy(to + i, &sum, 4);
    }
    if (!add) std::memcpy(to, from, static_cast<size_t>(bytes));
}

// A copy out of shared memory, of the chunks that visit_chunks(visit) calls visit(global address, shared address,
// begin, end) for.
template <class VisitChunks>
void store_chunks(const VisitChunks& visit_chunks, bool add, const Place& place) {
    const auto visit_races = [=](bool issues) {  // it may read until its wait
        if (!Races::on) return;
        visit_chunks([&](char* to, uint32_t from, int64_t begin, int64_t end) {
            races().access(Block::current()->touch_async(from, 16, place), 16, false);
            if (issues && to && begin < end) races().access(to + begin, static_cast<size_t>(end - begin), true, true);
        });
    };
    visit_races(true);
    const auto bytes = std::make_shared<std::vector<char>>();
    const auto read = [=, issuer = running] {
        if (running == issuer) visit_races(false);
        visit_chunks([&](char*, uint32_t from, int64_t, int64_t) {
            const char* source = Block::current()->touch_async(from, 16, place);
            bytes->insert(bytes->end(), source, source + 16);
        });
    };
    const auto write = [=] {
        const char* source = bytes->data();
        visit_chunks([&](char* to, uint32_t, int64_t begin, int64_t end) {
            if (to && begin < end) write_out(to + begin, source + begin, end - begin, add);
            source += 16;
        });
    };
    running->stores.submit(read, write);
    if (Block::current()->landing() == Landing::kEarly) running->stores.land_all();
}

// Writes, or adds floats. What lies beyond the tensor is left alone.
inline void tensor_store(const TensorMap& map, const Corner& corner, uint32_t shared, bool add, const Place& place) {
    check_copy(map, corner, shared, place);
    if (add && !map.is_float) fail(place.text() + ": only floats are added");
    store_chunks([=](auto visit) { each_chunk(map, shared, corner, visit); }, add, place);
}

// Runs of bytes without a map.
inline void check_run(uint32_t shared, const void* global, int bytes, const Place& place) {
    if (bytes <= 0 || bytes % 16 || shared % 16 || reinterpret_cast<uintptr_t>(global) % 16)
        fail(place.text() + ": not whole, aligned vectors of 16 bytes");
}
inline void bulk_store(void* global, uint32_t shared, int bytes, bool add, const Place& place) {
    check_run(shared, global, bytes, place);
    const auto visit_chunks = [=](auto visit) {
        for (int i = 0; i < bytes; i += 16)
            visit(static_cast<char*>(global) + i, shared + static_cast<uint32_t>(i), 0, 16);
    };
    store_chunks(visit_chunks, add, place);
}
inline void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier, const Place& place) {
    Block& block = *Block::current();
    check_run(shared, global, bytes, place);
    if (Races::on) races().access(global, static_cast<size_t>(bytes), false);
    for (int i = 0; i < bytes; i += 16) forget(shared + static_cast<uint32_t>(i), 16, place);
    mbarrier_at(barrier, place);
    const Clock issued = Races::on ? races().release(running->warp) : Clock{};
    block.submit([=] {
        for (int i = 0; i < bytes; i += 16)
            std::memcpy(Block::current()->touch_async(shared + static_cast<uint32_t>(i), 16, place),
                        static_cast<const char*>(global) + i, 16);
        mbarrier_complete(barrier, bytes, issued, place);
    });
}

}  // namespace emulator
