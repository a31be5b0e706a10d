// The operators of `model/step_ops.py` as functions that compiled code calls. They compute with what the calling
// thread has set. torch's compiler derives their names, `aoti_torch_cpu_` and the operator's.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_cpu.h>

#include <numeric>
#include <vector>

#include "kernels.h"

extern "C" {

struct Linear {  // layers that read the same tensor
  AtenTensorHandle weight, bias;  // weights that oneDNN has packed, or null; bias or null
  const Weights* own;             // weights that linear.cpp has packed, or null
};

struct Adapters {  // of the same layers, for the samples of a pass
  int64_t columns;  // outputs of all layers; 0 if no adapter has any of them
  const Adapter* adapters;
  int64_t reads_sampled;  // whether the layers read the tokens that are sampled, and no others
};

struct Pool {  // of one layer, [slots, kv_heads, dim]
  void *keys, *values;
};

struct Pass {  // one forward pass
  const Linear* linears;       // by group
  const Adapters* adapters;    // by group; null for none
  const Pool* pools;           // by layer
  const Step* const* windows;  // by the number that a layer's mask holds
  const int32_t *adapter, *sampled_adapter;  // of each token, and of each token that is sampled
  const float* const* penalties;             // by layer, as in `Layer`; null for none
  int64_t head;                // the group that logits come from, if only the largest of each are needed
  int64_t* largest;            // [sampled tokens] of these; null if all logits are
};

}  // extern "C"

namespace {

thread_local const Pass* running = nullptr;

struct Failure {};

void check(AOTITorchError error) {
  if (error) throw Failure();
}

AtenTensorHandle empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int i = int(sizes.size()) - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle handle;
  check(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                 &handle));
  return handle;
}

struct Tensor {
  AtenTensorHandle handle;
  bool is_owned;
  char* data;
  int64_t dims, *sizes, *strides;
  int32_t dtype;

  explicit Tensor(AtenTensorHandle handle, bool is_owned = false) : handle(handle), is_owned(is_owned) {
    check(aoti_torch_get_data_ptr(handle, (void**)&data));
    check(aoti_torch_get_dim(handle, &dims));
    check(aoti_torch_get_sizes(handle, &sizes));
    check(aoti_torch_get_strides(handle, &strides));
    check(aoti_torch_get_dtype(handle, &dtype));
  }
  Tensor(Tensor&& other) : Tensor(other.handle, other.is_owned) { other.is_owned = false; }
  ~Tensor() {
    if (is_owned) aoti_torch_delete_tensor_object(handle);
  }

  bool is_float() const { return dtype == aoti_torch_dtype_float32(); }
  int64_t rows() const { return std::accumulate(sizes, sizes + dims - 1, int64_t(1), std::multiplies<int64_t>()); }
};

// The tensor itself if its numbers lie side by side in the last dimensions, from `dim` on; a copy otherwise.
Tensor dense(AtenTensorHandle handle, int64_t dim) {
  Tensor tensor(handle);
  int64_t stride = 1;
  for (int64_t i = tensor.dims - 1; i >= dim; stride *= tensor.sizes[i--])
    if (tensor.sizes[i] > 1 && tensor.strides[i] != stride) {
      Tensor copy(empty({tensor.sizes, tensor.sizes + tensor.dims}, tensor.dtype), true);
      check(aoti_torch_copy_(copy.handle, handle, 0));
      return copy;
    }
  return tensor;
}

Tensor as_float(AtenTensorHandle handle) {
  Tensor tensor(handle);
  Tensor copy(empty({tensor.sizes, tensor.sizes + tensor.dims}, aoti_torch_dtype_float32()), true);
  check(aoti_torch_copy_(copy.handle, handle, 0));
  return copy;
}

float first_number(const Tensor& tensor) {
  return tensor.is_float() ? *(const float*)tensor.data : to_float(*(const bf16*)tensor.data);
}

// largest: where the largest outputs go; the product is not written then. Null if it is.
AtenTensorHandle multiply(const Weights& weights, AtenTensorHandle input_handle, int64_t* largest) {
  const Tensor input = dense(input_handle, 0);
  std::vector<int64_t> sizes(input.sizes, input.sizes + input.dims);
  sizes.back() = weights.outputs;
  const Tensor out(empty(sizes, input.dtype));
  if (input.is_float()) {
    if (largest) find_largest_float32((const float*)input.data, &weights, largest, input.rows());
    else multiply_float32((const float*)input.data, &weights, (float*)out.data, input.rows());
  }
#ifdef __AVX512BF16__
  else if (largest) find_largest_bfloat16((const bf16*)input.data, &weights, largest, input.rows());
  else multiply_bfloat16((const bf16*)input.data, &weights, (bf16*)out.data, input.rows());
#endif
  return out.handle;
}

AtenTensorHandle multiply(const Linear& linear, AtenTensorHandle input, int64_t* largest) {
  if (linear.own) return multiply(*linear.own, input, largest);
  AtenTensorHandle bias = linear.bias, out;
  const char* algorithm = "";
  check(aoti_torch_cpu__linear_pointwise(input, linear.weight, bias ? &bias : nullptr, "none", nullptr, 0, &algorithm,
                                         &out));
  return out;
}

void add_adapters(const Adapters& adapters, AtenTensorHandle input_handle, AtenTensorHandle product) {
  const Tensor input = dense(input_handle, 0), out(product);
  const int64_t rows = input.rows(), inputs = input.sizes[input.dims - 1];
  const int32_t* adapter = adapters.reads_sampled ? running->sampled_adapter : running->adapter;
  if (input.is_float())
    add_low_rank_float32((const float*)input.data, (float*)out.data, rows, inputs, adapters.columns,
                         adapters.adapters, adapter);
  else
    add_low_rank_bfloat16((const bf16*)input.data, (bf16*)out.data, rows, inputs, adapters.columns,
                          adapters.adapters, adapter);
}

AtenTensorHandle attend(const Tensor& query, const Tensor& key, const Tensor& value, const Step& step, const Pool& pool,
                        double scale, double softcap, const float* sinks, const float* penalties) {
  const int64_t heads = query.sizes[1], tokens = query.sizes[2], value_dim = value.sizes[3];
  const Tensor out(empty({1, tokens, heads, value_dim}, query.dtype));
  const Layer layer = {heads,           key.sizes[1],     key.sizes[3],     value_dim,        query.data,
                       query.strides[2], query.strides[1], key.data,        key.strides[2],   key.strides[1],
                       value.data,      value.strides[2], value.strides[1], pool.keys,        pool.values,
                       out.data,        float(scale),     float(softcap),   sinks,            penalties};
  (query.is_float() ? attend_float32 : attend_bfloat16)(&step, &layer);
  return out.handle;
}

}  // namespace

extern "C" void set_pass(const Pass* pass) { running = pass; }

extern "C" AOTITorchError aoti_torch_cpu_step_linear(AtenTensorHandle input, int64_t group, int64_t, AtenTensorHandle* out) {
  try {
    *out = multiply(running->linears[group], input, group == running->head ? running->largest : nullptr);
    const Adapters* adapters = running->adapters ? running->adapters + group : nullptr;
    if (adapters && adapters->columns) add_adapters(*adapters, input, *out);
    return 0;
  } catch (const Failure&) {
    return 1;
  }
}

extern "C" AOTITorchError aoti_torch_cpu_step_attend(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value,
                                              AtenTensorHandle mask, int64_t layer, double scale, const double* softcap,
                                              const AtenTensorHandle* sinks, AtenTensorHandle* out) {
  try {
    const Step& step = *running->windows[int(first_number(Tensor(mask)))];
    const Pool& pool = running->pools[layer];
    const Tensor q = dense(query, 3), k = dense(key, 3), v = dense(value, 3);
    const double cap = softcap ? *softcap : 0;
    const float* penalties = running->penalties ? running->penalties[layer] : nullptr;
    if (sinks) *out = attend(q, k, v, step, pool, scale, cap, (const float*)as_float(*sinks).data, penalties);
    else *out = attend(q, k, v, step, pool, scale, cap, nullptr, penalties);
    return 0;
  } catch (const Failure&) {
    return 1;
  }
}
