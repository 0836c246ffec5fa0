// An accelerator that is emulated: its tensors lie in the memory of the CPU and its kernels are
// those of the CPU, but an operation on tensors of both devices fails, as on a GPU.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
using c10::SymIntArrayRef;
using std::optional;

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
const Device kDevice(kType, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, kDevice); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, kDevice); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? malloc(bytes) : nullptr;
    return {data, data, &free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(kType, &memory);

struct Generator final : at::CPUGeneratorImpl {
  Generator() {
    device_ = kDevice;
    key_set_ = kKeys;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  void init() const override {}
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const auto generator = at::make_generator<at::CPUGeneratorImpl>();
    return generator;
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
};
Hooks hooks;

// The same memory, as a tensor of the CPU.
Tensor on_cpu(const Tensor& t) {
  if (t.device().type() != kType) return t;
  auto* start = static_cast<char*>(t.storage().mutable_data());
  if (start) start += t.storage_offset() * t.itemsize();
  return at::from_blob(start, t.sizes(), t.strides(), at::TensorOptions().dtype(t.dtype()));
}

Tensor empty(SymIntArrayRef sizes, optional<at::ScalarType> dtype, optional<at::Layout>,
             optional<Device>, optional<bool>, optional<at::MemoryFormat> format) {
  const auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), &memory, kKeys, type, format);
}

Tensor empty_strided(SymIntArrayRef sizes, SymIntArrayRef strides, optional<at::ScalarType> dtype,
                     optional<at::Layout>, optional<Device>, optional<bool>) {
  const auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &memory, kKeys, type);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.numel() == 0) return to;
  auto values = on_cpu(from);
  if (from.is_conj()) values = values.conj().resolve_conj();
  if (from.is_neg()) values = values.neg();
  on_cpu(to).copy_(values);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  // A result may be a view with strides of its own, which a change of size would undo.
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize(const Tensor& t, SymIntArrayRef sizes, optional<at::MemoryFormat>) {
  const auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  if (t.sizes() == size) return t;
  const auto bytes = static_cast<size_t>(c10::multiply_integers(size)) * t.itemsize();
  auto storage = t.storage();
  if (storage.nbytes() < bytes) {
    auto larger = memory.allocate(bytes);
    if (storage.nbytes()) memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
  t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return t;
}

Tensor& set(Tensor& t, at::Storage storage, int64_t offset, IntArrayRef sizes,
            IntArrayRef strides) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(sizes, strides);
  return t;
}

at::Scalar item(const Tensor& t) { return on_cpu(t).item(); }

Tensor as_strided(const Tensor& t, SymIntArrayRef sizes, SymIntArrayRef strides,
                  optional<c10::SymInt> offset) {
  optional<int64_t> start;
  if (offset) start = offset->expect_int();
  return at::native::as_strided_tensorimpl(
      t, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), start);
}

Tensor view(const Tensor& t, SymIntArrayRef sizes) {
  return at::native::view(t, C10_AS_INTARRAYREF_SLOW(sizes));
}

Tensor reshape_alias(const Tensor& t, SymIntArrayRef sizes, SymIntArrayRef strides) {
  return at::native::_reshape_alias(
      t, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

Tensor unfold(const Tensor& t, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(t, dim, size, step);
}

Tensor alias(const Tensor& t) { return at::native::alias(t); }
Tensor view_as_real(const Tensor& t) { return at::native::view_as_real(t); }
Tensor view_as_complex(const Tensor& t) { return at::native::view_as_complex(t); }

Tensor convolution(const Tensor& input, const Tensor& weight, const optional<Tensor>& bias,
                   SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                   bool transposed, SymIntArrayRef output_padding, c10::SymInt groups) {
  optional<Tensor> shift;
  if (bias && bias->defined()) shift = on_cpu(*bias);
  return at::convolution_symint(on_cpu(input), on_cpu(weight), shift, stride, padding, dilation,
                                transposed, output_padding, groups)
      .to(kDevice);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, SymIntArrayRef stride,
    SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed,
    SymIntArrayRef output_padding, c10::SymInt groups, std::array<bool, 3> wanted) {
  const c10::SymInt channels(
      transposed ? weight.size(1) * groups.expect_int() : weight.size(0));
  auto [of_input, of_weight, of_bias] = at::convolution_backward_symint(
      on_cpu(gradient), on_cpu(input), on_cpu(weight), SymIntArrayRef(&channels, 1), stride,
      padding, dilation, transposed, output_padding, groups, wanted);
  const auto back = [](const Tensor& t) { return t.defined() ? t.to(kDevice) : t; };
  return {back(of_input), back(of_weight), back(of_bias)};
}

// Every other operation, by its kernel for the CPU.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  // Indices and sources of a copy may lie on the CPU, and so may numbers.
  const bool mixes = name == "aten::index" || name == "aten::index_put_" ||
                     name == "aten::_index_put_impl_" || name == "aten::copy_" ||
                     name == "aten::_to_copy";
  optional<Device> device;
  const auto look = [&](const Tensor& t) {
    if (mixes || !t.defined() || (t.dim() == 0 && t.device().is_cpu())) return;
    if (!device) device = t.device();
    TORCH_CHECK(device->type() == t.device().type(), name, " got tensors on ", device->str(),
                " and ", t.device().str());
  };
  const auto count = op.schema().arguments().size();
  optional<at::Generator> drawn;
  at::Generator standing_in;
  for (auto& value : torch::jit::last(*stack, count)) {
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList())
      for (const auto& t : value.toTensorVector()) look(t);
    if (value.isGenerator() && value.toGenerator().device().type() == kType) {
      drawn = value.toGenerator();
      standing_in = at::make_generator<at::CPUGeneratorImpl>();
      standing_in.set_state(drawn->get_state());
      const_cast<c10::IValue&>(value) = standing_in;
    }
  }
  at::native::cpu_fallback(op, stack);
  if (drawn) drawn->set_state(standing_in.get_state());
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("alias", alias);
  m.impl("view_as_real", view_as_real);
  m.impl("view_as_complex", view_as_complex);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

PYBIND11_MODULE(device, m) { at::RegisterPrivateUse1HooksInterface(&hooks); }
