// SPDX-License-Identifier: Apache-2.0
// Copies fragments between a KV cache and a slot, both in device memory.
//
// One body for nvcc, NVRTC and a host's C++ compiler (PAGE_COPY_HOST; tests run it in any order of threads). A warp takes
// a fragment at a time, its lanes 16 bytes each and UNROLL of them in flight. A slot is passed through once, so loads and
// stores are streaming ones. No thread waits for another.

#ifdef PAGE_COPY_HOST
struct uint4 { unsigned x, y, z, w; };
struct Place { unsigned x; };
static Place threadIdx, blockIdx, blockDim, gridDim;
#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __restrict__
static uint4 __ldcs(const uint4 *from) { return *from; }
static void __stcs(uint4 *to, uint4 value) { *to = value; }
#endif

struct Fragment {
    unsigned long long device;  // address in the KV cache, a multiple of 16
    unsigned offset;            // in the slot, in units of 16 bytes
    unsigned length;            // in units of 16 bytes
};

static constexpr unsigned WARP = 32, UNROLL = 4;

static __device__ void copy_run(uint4 *__restrict__ to, const uint4 *__restrict__ from, unsigned length, unsigned lane)
{
    unsigned at = lane;
    for (; at + (UNROLL - 1) * WARP < length; at += UNROLL * WARP) {
        uint4 a = __ldcs(from + at), b = __ldcs(from + at + WARP);
        uint4 c = __ldcs(from + at + 2 * WARP), d = __ldcs(from + at + 3 * WARP);
        __stcs(to + at, a);
        __stcs(to + at + WARP, b);
        __stcs(to + at + 2 * WARP, c);
        __stcs(to + at + 3 * WARP, d);
    }
    for (; at < length; at += WARP)
        __stcs(to + at, __ldcs(from + at));
}

template <bool SCATTER>
static __device__ void copy_fragments(const Fragment *__restrict__ table, unsigned count, uint4 *__restrict__ slot)
{
    const unsigned warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
    for (unsigned number = blockIdx.x * warps + threadIdx.x / WARP; number < count; number += gridDim.x * warps) {
        const uint4 packed = __ldcs(reinterpret_cast<const uint4 *>(table + number));
        uint4 *device = reinterpret_cast<uint4 *>(packed.x | static_cast<unsigned long long>(packed.y) << 32);
        if (SCATTER)
            copy_run(device, slot + packed.z, packed.w, lane);
        else
            copy_run(slot + packed.z, device, packed.w, lane);
    }
}

extern "C" __global__ void __launch_bounds__(256) page_scatter(const Fragment *table, unsigned count, uint4 *slot)
{
    copy_fragments<true>(table, count, slot);
}

extern "C" __global__ void __launch_bounds__(256) page_gather(const Fragment *table, unsigned count, uint4 *slot)
{
    copy_fragments<false>(table, count, slot);
}

#ifdef PAGE_COPY_HOST
// Runs every thread of a launch, in the order that `order` gives (numbers of threads of all blocks).
extern "C" void run(int scatter, const Fragment *table, unsigned count, uint4 *slot, unsigned blocks, unsigned threads,
                    const unsigned *order)
{
    gridDim.x = blocks;
    blockDim.x = threads;
    for (unsigned turn = 0; turn < blocks * threads; ++turn) {
        blockIdx.x = order[turn] / threads;
        threadIdx.x = order[turn] % threads;
        if (scatter)
            page_scatter(table, count, slot);
        else
            page_gather(table, count, slot);
    }
}
#endif
