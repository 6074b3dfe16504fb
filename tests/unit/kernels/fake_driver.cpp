// SPDX-License-Identifier: Apache-2.0
// A CUDA driver without a device, for tests: what is asked of it happens in host memory, at once and in order. Prototypes
// are cuda.h's own, so that a call which does not fit them does not compile here, or shows in what arrives.

#define PAGE_COPY_HOST
#include "page_copy.cu"

#include <cuda.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <vector>

// FAKE_VERSION is the driver's; FAKE_REFUSES makes it refuse batches.
static int version() { return std::getenv("FAKE_VERSION") ? std::atoi(std::getenv("FAKE_VERSION")) : 13000; }
static thread_local CUcontext current = nullptr;
static const CUcontext primary = reinterpret_cast<CUcontext>(0x1000);  // handles are numbers that nothing looks behind
#define NEEDS_CONTEXT if (current != primary) return CUDA_ERROR_INVALID_CONTEXT
static void say(const char *what) { std::fprintf(stderr, "driver: %s\n", what); }

extern "C" {
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *v) { *v = version(); return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int ordinal) { *d = ordinal; return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS; }
CUresult cuDeviceGetUuid_v2(CUuuid *u, CUdevice) { for (int i = 0; i < 16; ++i) u->bytes[i] = i; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute which, CUdevice) {
    *v = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice) { *c = primary; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { current = c; return CUDA_SUCCESS; }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) { NEEDS_CONTEXT; *least = 0; *greatest = -5; return CUDA_SUCCESS; }
CUresult cuStreamCreateWithPriority(CUstream *s, unsigned flags, int priority) {
    NEEDS_CONTEXT;
    if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    *s = reinterpret_cast<CUstream>(0x2000 - priority); return CUDA_SUCCESS; }
CUresult cuStreamWaitEvent(CUstream s, CUevent e, unsigned flags) {
    NEEDS_CONTEXT; return s && e && !flags ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }
CUresult cuEventCreate(CUevent *e, unsigned) { NEEDS_CONTEXT; *e = static_cast<CUevent>(std::malloc(16)); return CUDA_SUCCESS; }
CUresult cuEventDestroy_v2(CUevent e) { std::free(e); return CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent e, CUstream s) { NEEDS_CONTEXT; return e && s ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }
static int asked = 0;
CUresult cuEventQuery(CUevent e) { NEEDS_CONTEXT; return !e ? CUDA_ERROR_INVALID_HANDLE : asked++ % 2 ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY; }
CUresult cuEventSynchronize(CUevent e) { NEEDS_CONTEXT; return e ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }
CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t n) { NEEDS_CONTEXT; *p = reinterpret_cast<CUdeviceptr>(std::aligned_alloc(256, (n + 255) / 256 * 256)); say("device memory"); return CUDA_SUCCESS; }
CUresult cuMemFree_v2(CUdeviceptr p) { NEEDS_CONTEXT; std::free(reinterpret_cast<void *>(p)); say("device memory freed"); return CUDA_SUCCESS; }
CUresult cuMemHostAlloc(void **p, size_t n, unsigned flags) { NEEDS_CONTEXT; if (flags) return CUDA_ERROR_INVALID_VALUE; *p = std::aligned_alloc(4096, (n + 4095) / 4096 * 4096); say("pinned memory"); return CUDA_SUCCESS; }
CUresult cuMemFreeHost(void *p) { NEEDS_CONTEXT; std::free(p); say("pinned memory freed"); return CUDA_SUCCESS; }
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
    NEEDS_CONTEXT; if (!s) return CUDA_ERROR_INVALID_HANDLE;
    std::memcpy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), n); say("copy"); return CUDA_SUCCESS; }
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr *to, CUdeviceptr *from, size_t *n, size_t count, CUmemcpyAttributes *attributes,
                               size_t *first, size_t kinds, CUstream s) {
    NEEDS_CONTEXT;
    if (!s || !count || kinds != 1 || first[0] != 0 || attributes->flags || attributes->srcLocHint.type || attributes->dstLocHint.type)
        return CUDA_ERROR_INVALID_VALUE;
    if (attributes->srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM && attributes->srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_ANY)
        return CUDA_ERROR_INVALID_VALUE;
    if (std::getenv("FAKE_REFUSES")) return CUDA_ERROR_ILLEGAL_STATE;
    for (size_t i = 0; i < count; ++i) std::memcpy(reinterpret_cast<void *>(to[i]), reinterpret_cast<void *>(from[i]), n[i]);
    say(attributes->srcAccessOrder == CU_MEMCPY_SRC_ACCESS_ORDER_ANY ? "batch, any order" : "batch, stream order");
    return CUDA_SUCCESS;
}
#undef cuMemcpyBatchAsync
CUresult cuMemcpyBatchAsync(CUdeviceptr *to, CUdeviceptr *from, size_t *n, size_t count, CUmemcpyAttributes *attributes,
                            size_t *first, size_t kinds, size_t *failed, CUstream s) {
    *failed = ~size_t(0);
    return cuMemcpyBatchAsync_v2(to, from, n, count, attributes, first, kinds, s);
}
CUresult cuModuleLoadData(CUmodule *m, const void *image) {
    NEEDS_CONTEXT; *m = reinterpret_cast<CUmodule>(0x3000); return std::memcmp(image, "\x7f" "ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule, const char *name) {
    *f = reinterpret_cast<CUfunction>(std::strcmp(name, "page_scatter") ? std::strcmp(name, "page_gather") ? 0 : 0x5000 : 0x4000);
    return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND; }
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **arguments, void **extra) {
    NEEDS_CONTEXT;
    if (!s || gy != 1 || gz != 1 || by != 1 || bz != 1 || shared || extra || !gx) return CUDA_ERROR_INVALID_VALUE;
    std::vector<unsigned> order(gx * bx);
    for (unsigned i = 0; i < gx * bx; ++i) order[i] = i;
    run(f == reinterpret_cast<CUfunction>(0x4000), *static_cast<Fragment **>(arguments[0]),
        *static_cast<unsigned *>(arguments[1]), *static_cast<uint4 **>(arguments[2]), gx, bx, order.data());
    say("launch");
    return CUDA_SUCCESS;
}
#undef cuGetProcAddress
CUresult cuGetProcAddress_v2(const char *symbol, void **address, int since, cuuint64_t, CUdriverProcAddressQueryResult *status);
}
extern "C" CUresult cuGetProcAddress_v2(const char *symbol, void **address, int since, cuuint64_t flags,
                                        CUdriverProcAddressQueryResult *status) {
    if (since > version()) since = version();
    *address = nullptr;
    char newer[128];
    bool batch = !std::strcmp(symbol, "cuMemcpyBatchAsync");
    if (!(batch && since < 13000)) {
        std::snprintf(newer, sizeof newer, "%s_v2", symbol);
        *address = dlsym(RTLD_DEFAULT, newer);
    }
    if (!*address) *address = dlsym(RTLD_DEFAULT, symbol);
    if (batch && version() < 12080) *address = nullptr;
    if (status) *status = *address ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *address ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
extern "C" CUresult cuGetProcAddress(const char *symbol, void **address, int since, cuuint64_t flags) {
    return cuGetProcAddress_v2(symbol, address, since, flags, nullptr);
}
