// A "cuda" device for a build of torch that has none. Its memory is the host's; every operator runs as its CPU kernel,
// through torch's own fallback. So results are the CPU's, and what remains is what tests on a CPU can't see:
//
//   - tensors of the two devices do not mix
//   - the host waits where it would wait for a GPU: numbers read, copies that block; counted, not slow
//   - memory ends at a limit, with torch.OutOfMemoryError
//
// It has one card, one stream, and none of cuDNN, NCCL or graphs. device.py builds, loads and controls it.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

using namespace c10;
namespace native = at::native;

namespace {

const Device CARD(DeviceType::CUDA, 0);

// ---------------------------------------------------------------------------------------------------------------------
// Counters, read and set from Python

struct {
  int64_t syncs = 0;
  int64_t allocated = 0;
  int64_t peak = 0;
  int64_t limit = INT64_MAX;
} card;

thread_local bool by_fallback = false;  // copies inside an operator stay on the card

void host_waits() {
  if (!by_fallback) card.syncs++;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory: blocks of 512 bytes, as CUDA's caching allocator rounds them

struct DeviceMemory final : Allocator {
  struct Block {
    void* pointer;
    int64_t bytes;
  };
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    card.allocated -= block->bytes;
    std::free(block->pointer);
    delete block;
  }
  DataPtr allocate(size_t n) override {
    const int64_t bytes = (n + 511) / 512 * 512;
    TORCH_CHECK_WITH(OutOfMemoryError, card.allocated + bytes <= card.limit,
                     "CUDA out of memory. Tried to allocate ", n, " bytes; ", card.limit - card.allocated, " are free.");
    card.allocated += bytes;
    card.peak = std::max(card.peak, card.allocated);
    auto* block = new Block{bytes ? std::aligned_alloc(512, bytes) : nullptr, bytes};
    return {block->pointer, block, &release, CARD};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} device_memory;

struct PinnedMemory final : Allocator {  // ordinary memory that knows its addresses
  std::mutex mutex;
  std::map<const char*, size_t> blocks;
  static void release(void* pointer);
  DataPtr allocate(size_t n) override {
    auto* pointer = static_cast<char*>(std::malloc(n + 1));
    std::lock_guard lock(mutex);
    blocks[pointer] = n;
    return {pointer, pointer, &release, Device(kCPU)};
  }
  bool holds(const void* pointer) {
    std::lock_guard lock(mutex);
    auto after = blocks.upper_bound(static_cast<const char*>(pointer));
    return after != blocks.begin() && pointer <= (--after)->first + after->second;
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} pinned_memory;

void PinnedMemory::release(void* pointer) {
  std::lock_guard lock(pinned_memory.mutex);
  pinned_memory.blocks.erase(static_cast<char*>(pointer));
  std::free(pointer);
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers: a CPU generator that says it is the card's

struct CardGenerator final : GeneratorImpl {
  at::Generator host;
  explicit CardGenerator(at::Generator host)
      : GeneratorImpl(CARD, DispatchKeySet(DispatchKey::CUDA)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  intrusive_ptr<TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  void graphsafe_set_state(const intrusive_ptr<GeneratorImpl>&) override {}
  CardGenerator* clone_impl() const override { return new CardGenerator(host.clone()); }
};

at::Generator& default_generator() {
  static at::Generator made = at::make_generator<CardGenerator>(at::detail::createCPUGenerator());
  return made;
}

// ---------------------------------------------------------------------------------------------------------------------
// Operators

at::Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
                 std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_memory, DispatchKeySet(DispatchKey::CUDA), dtype_or_default(dtype), format);
}

at::Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                         std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_memory, DispatchKeySet(DispatchKey::CUDA), dtype_or_default(dtype));
}

at::Tensor on_host(const at::Tensor& tensor) {  // the same memory
  if (!tensor.is_cuda()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(kCPU));
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  const at::Tensor& host = to.is_cuda() ? from : to;
  if (to.is_cuda() != from.is_cuda() && !(non_blocking && pinned_memory.holds(host.const_data_ptr()))) host_waits();
  at::NoGradGuard no_grad;
  if (to.numel()) on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {  // a result of the fallback
  native::resize_impl_cpu_(to.unsafeGetTensorImpl(), from.sizes(), std::nullopt);
  at::Tensor result = to;
  return copy_(result, from, false);
}

const at::Tensor& resize_(const at::Tensor& tensor, IntArrayRef size, std::optional<MemoryFormat>) {
  native::resize_impl_cpu_(tensor.unsafeGetTensorImpl(), size, std::nullopt);
  return tensor;
}

const std::set<std::string> READ_BY_HOST = {  // their results, or the sizes of them, depend on values
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"};

void fallback(const OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  bool on_card = false, on_host = false;
  auto look = [&](const at::Tensor& tensor) {
    on_card |= tensor.defined() && tensor.is_cuda();
    on_host |= tensor.defined() && tensor.is_cpu() && tensor.dim() > 0;  // one number may come from the host
  };
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) for (const at::Tensor& tensor : value.toTensorVector()) look(tensor);
    else if (value.isOptionalTensorList()) {  // indices: masks are counted, and those of the host copied
      for (auto index : value.toOptionalTensorVector())
        if (index && (index->scalar_type() == kBool || index->scalar_type() == kByte || index->is_cpu())) host_waits();
    }
    else if (value.isGenerator()) {
      const at::Generator generator = value.toGenerator();
      TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
      value = static_cast<CardGenerator*>(generator.unsafeGetGeneratorImpl())->host;
    }
  }
  TORCH_CHECK(!on_card || !on_host, name,
              ": Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!");
  if (READ_BY_HOST.count(name)) host_waits();
  struct Inside {
    bool outer = std::exchange(by_fallback, true);
    ~Inside() { by_fallback = outer; }
  } inside;
  native::cpu_fallback(op, stack);
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
                     double dropout, bool causal, std::optional<double> scale, bool gqa) {
  return std::get<0>(at::_scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, std::nullopt, scale, gqa));
}

// ---------------------------------------------------------------------------------------------------------------------
// What torch asks a device for

struct Guard final : impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  DeviceType type() const override { return static_type; }
  Device exchangeDevice(Device) const override { return CARD; }
  Device getDevice() const override { return CARD; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, CARD); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, CARD); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, CARD); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, CARD); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { host_waits(); }
  void synchronizeDevice(const DeviceIndex) const override { host_waits(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

namespace at {
struct CUDAHooks final : CUDAHooksInterface {  // the registry knows it by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* pointer) const override { return pinned_memory.holds(pointer); }
  Device getDeviceFromPtr(void*) const override { return CARD; }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return default_generator(); }
  Generator getNewGenerator(DeviceIndex) const override {
    return make_generator<CardGenerator>(at::detail::createCPUGenerator());
  }
  void deviceSynchronize(DeviceIndex) const override { host_waits(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize_);
  m.impl("as_strided", native::as_strided_tensorimpl);
  m.impl("view", native::view);
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, Storage)>(native::set_));
  m.impl("set_.source_Storage_storage_offset", native::set_storage_cpu_);
  m.impl("_reshape_alias", native::_reshape_alias);
  m.impl("scaled_dot_product_attention", attention);  // a CPU build can't choose among CUDA's kernels
}
TORCH_LIBRARY_IMPL(aten, AutogradCUDA, m) { m.impl("scaled_dot_product_attention", attention); }

extern "C" {
int64_t card_syncs() { return card.syncs; }
int64_t card_allocated() { return card.allocated; }
int64_t card_peak() { return card.peak; }
void card_reset_peak() { card.peak = card.allocated; }
void card_set_limit(int64_t bytes) { card.limit = bytes; }
}
