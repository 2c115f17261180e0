// Embeddings per member. No autocast: like F.embedding, they keep the dtype of the table.
//
//   ensemble_embedding(index, weight, sparse)               rows of one table
//   ensemble_embedding_concat(categorical, tables, numeric) rows of many side by side, then numbers
//
// and what their gradients are made with. Both are linear in tables and numbers, so the derivative
// of a backward operation is the forward operation. One kernel serves both.

#include "ops/torch.h"

#include <atomic>
#include <forward_list>
#include <numeric>
#include <optional>
#include <vector>

#include "kernels/ensemble_embedding.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/operation.h"

namespace pyens {
namespace {

using at::Tensor;
using at::TensorList;
using c10::SymInt;
using c10::SymIntArrayRef;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr char kOp[] = "ensemble_embedding";
constexpr char kConcat[] = "ensemble_embedding_concat";

// --- checks --------------------------------------------------------------------------------------

void check_table(const char* op, ArgumentName name, const Tensor& table) {
  PYENS_CHECK_TYPE(is_kernel_dtype(table.scalar_type()), op, name,
                   "float32, float64, bfloat16 or float16", table.scalar_type());
  PYENS_CHECK_VALUE(table.dim() == 3, op, name, "[E, N, D]", "shape ", table.sym_sizes());
  PYENS_CHECK_VALUE(table.sym_size(0) >= 1 && table.sym_size(1) >= 1 && table.sym_size(2) >= 1, op,
                    name, "[E, N, D], none of them 0", "shape ", table.sym_sizes());
}

// `columns` is -1 for an index without that dimension: [B] or [E, B].
void check_index(const char* op, ArgumentName name, const Tensor& index, ArgumentName like_name,
                 const Tensor& like, int64_t columns = -1) {
  PYENS_CHECK_TYPE(index.scalar_type() == at::kLong, op, name, "int64", index.scalar_type());
  PYENS_CHECK_TYPE(index.device() == like.device(), op, name,
                   c10::str("the device of ", like_name, " (", like.device(), ")"), index.device());
  const int64_t shared_dim = columns < 0 ? 1 : 2;
  const auto expected = [&] {
    const auto e = like.sym_size(0);
    return columns < 0 ? c10::str("[B] or [", e, ", B]")
                       : c10::str("[B, ", columns, "] or [", e, ", B, ", columns, "]");
  };
  PYENS_CHECK_VALUE((index.dim() == shared_dim || index.dim() == shared_dim + 1) &&
                        (columns < 0 || index.sym_size(-1) == columns),
                    op, name, expected(), "shape ", index.sym_sizes());
  PYENS_CHECK_VALUE(index.dim() == shared_dim || index.sym_size(0) == like.sym_size(0), op, name,
                    expected(), "shape ", index.sym_sizes());
}

void check_embedding(const Tensor& index, const Tensor& weight) {
  check_table(kOp, {"weight"}, weight);
  check_index(kOp, {"index"}, index, {"weight"}, weight);
}

void check_concat(const Tensor& categorical, TensorList tables, const OptionalTensor& numeric) {
  PYENS_CHECK_VALUE(!tables.empty(), kConcat, "tables", "at least one", "an empty list");
  const Tensor& first = tables[0];
  const ArgumentName first_name{"tables", 0};
  for (size_t t = 0; t < tables.size(); ++t) {
    const ArgumentName name{"tables", static_cast<int64_t>(t)};
    check_table(kConcat, name, tables[t]);
    check_same_kind(kConcat, name, tables[t], first_name, first);
    PYENS_CHECK_VALUE(tables[t].sym_size(0) == first.sym_size(0), kConcat, name,
                      c10::str("the ensemble size of tables[0] (", first.sym_size(0), ")"),
                      "shape ", tables[t].sym_sizes());
  }
  check_index(kConcat, {"categorical"}, categorical, first_name, first,
              static_cast<int64_t>(tables.size()));
  if (!numeric) return;
  check_same_kind(kConcat, {"numeric"}, *numeric, first_name, first);
  const auto expected = [&] {
    const auto e = first.sym_size(0), b = categorical.sym_size(-2);
    return c10::str("[", b, ", F] or [", e, ", ", b, ", F]");
  };
  PYENS_CHECK_VALUE(numeric->dim() == 2 || numeric->dim() == 3, kConcat, "numeric", expected(),
                    "shape ", numeric->sym_sizes());
  PYENS_CHECK_VALUE(numeric->sym_size(-2) == categorical.sym_size(-2) &&
                        (numeric->dim() == 2 || numeric->sym_size(0) == first.sym_size(0)),
                    kConcat, "numeric", expected(), "shape ", numeric->sym_sizes());
}

void check_grad(const char* op, const Tensor& grad, ArgumentName index_name, const Tensor& index,
                int64_t columns = -1) {
  PYENS_CHECK_TYPE(is_kernel_dtype(grad.scalar_type()), op, "grad",
                   "float32, float64, bfloat16 or float16", grad.scalar_type());
  PYENS_CHECK_VALUE(grad.dim() == 3, op, "grad", "[E, B, features]", "shape ", grad.sym_sizes());
  check_index(op, index_name, index, {"grad"}, grad, columns);
  const SymInt batch = columns < 0 ? index.sym_size(-1) : index.sym_size(-2);
  PYENS_CHECK_VALUE(grad.sym_size(1) == batch, op, "grad", c10::str("[E, ", batch, ", features]"),
                    "shape ", grad.sym_sizes());
}

void check_backward(const Tensor& grad, const Tensor& index, const SymInt& num_embeddings) {
  check_grad(kOp, grad, {"index"}, index);
  PYENS_CHECK_VALUE(grad.sym_size(2) >= 1, kOp, "grad", "[E, B, D], D not 0", "shape ",
                    grad.sym_sizes());
  PYENS_CHECK_VALUE(num_embeddings >= 1, kOp, "num_embeddings", "at least 1", num_embeddings);
}

void check_concat_backward(const Tensor& grad, const Tensor& categorical,
                           SymIntArrayRef num_embeddings, SymIntArrayRef dims,
                           at::IntArrayRef needs_grad) {
  const auto tables = static_cast<int64_t>(num_embeddings.size());
  check_grad(kConcat, grad, {"categorical"}, categorical, tables);
  PYENS_CHECK_VALUE(dims.size() == num_embeddings.size(), kConcat, "dims",
                    c10::str("one for each of the ", tables, " tables"), dims.size());
  SymInt columns = 0;
  for (size_t t = 0; t < dims.size(); ++t) {
    PYENS_CHECK_VALUE(num_embeddings[t] >= 1 && dims[t] >= 1, kConcat,
                      c10::str("num_embeddings and dims of table ", t), "at least 1",
                      num_embeddings[t], " and ", dims[t]);
    columns += dims[t];
  }
  PYENS_CHECK_VALUE(grad.sym_size(2) >= columns, kConcat, "grad",
                    c10::str("at least ", columns, " features"), "shape ", grad.sym_sizes());
  for (size_t i = 0; i < needs_grad.size(); ++i) {
    PYENS_CHECK_VALUE(needs_grad[i] > (i == 0 ? -1 : needs_grad[i - 1]) && needs_grad[i] <= tables,
                      kConcat, "needs_grad", c10::str("ascending positions from 0 to ", tables),
                      needs_grad);
  }
}

// What errors call column t of the index of either operation.
std::string column_name(const char* op, size_t t) {
  return op == kOp ? "index" : c10::str("categorical[..., ", t, "]");
}

// Looks for the index that a kernel met: the first one, whichever the threads met first.
[[noreturn]] void raise_out_of_range(const char* op, const Tensor& categorical,
                                     at::IntArrayRef num_embeddings) {
  for (size_t t = 0; t < num_embeddings.size(); ++t) {
    const Tensor column = categorical.select(-1, static_cast<int64_t>(t));
    const int64_t n = num_embeddings[t];
    const Tensor wrong = column.masked_select(column.lt(0).logical_or_(column.ge(n)));
    PYENS_CHECK_VALUE(wrong.numel() == 0, op, column_name(op, t), c10::str("0 to ", n - 1),
                      wrong[0].item<int64_t>());
  }
  TORCH_CHECK_VALUE(false, op, ": ", column_name(op, 0), ": changed while it was read");
}

// --- launch --------------------------------------------------------------------------------------

// Whether all indices were in range.
template <class Params>
bool launch(const Params& params) {
  namespace cpu = ensemble_embedding_cpu;
  std::atomic<bool> in_range{true};
  launch_cpu(cpu::work_items(params), cpu::grain_size(params), cpu::scratch_bytes(params),
             [&](int64_t begin, int64_t end, void* scratch) {
               if (!cpu::run(params, begin, end, scratch)) in_range = false;
             });
  return in_range;
}

int64_t member_stride(const Tensor& tensor) { return tensor.dim() == 3 ? tensor.stride(0) : 0; }

// `categorical` [B, C] or [E, B, C], one column for each table.
Tensor gather(const char* op, const Tensor& categorical, TensorList tables,
              const OptionalTensor& numeric) {
  std::forward_list<Tensor> copies;
  c10::SmallVector<EmbeddingTable, 8> entries;
  c10::SmallVector<int64_t, 8> num_embeddings;
  EmbeddingGather params{};
  for (const Tensor& table : tables) {
    const Tensor& weight = with_contiguous_rows(table, copies);
    EmbeddingTable entry{};
    entry.weight = weight.const_data_ptr();
    entry.index = categorical.const_data_ptr<int64_t>() +
                  static_cast<int64_t>(entries.size()) * categorical.stride(-1);
    entry.num_embeddings = weight.size(1);
    entry.dim = weight.size(2);
    entry.member_stride = weight.stride(0);
    entry.row_stride = weight.stride(1);
    entry.offset = params.num_features;
    params.num_features += entry.dim;
    entries.push_back(entry);
    num_embeddings.push_back(entry.num_embeddings);
  }
  params.dtype = kernel_dtype(tables[0].scalar_type());
  params.ensemble_size = tables[0].size(0);
  params.batch = categorical.size(-2);
  params.num_tables = static_cast<int64_t>(entries.size());
  params.tables = entries.data();
  params.index_member_stride = member_stride(categorical);
  params.index_row_stride = categorical.stride(-2);
  if (numeric) {
    const Tensor& x = with_contiguous_rows(*numeric, copies);
    params.numeric = x.const_data_ptr();
    params.numeric_features = x.size(-1);
    params.numeric_member_stride = member_stride(x);
    params.numeric_row_stride = x.stride(-2);
    params.num_features += params.numeric_features;
  }
  Tensor features =
      empty_result({params.ensemble_size, params.batch, params.num_features}, tables[0].options());
  params.features = features.mutable_data_ptr();
  if (features.is_cuda()) {
    launch_cuda(op, features,
                [&](void* stream) { return ensemble_embedding_cuda::run(params, stream); });
    return features;
  }
  if (!launch(params)) raise_out_of_range(op, categorical, num_embeddings);
  return features;
}

// `column` [B] or [E, B] of the index, sorted, and the sums that a kernel is to take by it.
struct SortedColumn {
  Tensor sorted, order;
  EmbeddingSortedSums params{};

  SortedColumn(const Tensor& column, const Tensor& grad, int64_t num_embeddings, int64_t dim,
               int64_t offset) {
    // Stable, so in ascending order of the examples for each row.
    const auto found = at::sort(column, /*stable=*/true, /*dim=*/-1, /*descending=*/false);
    sorted = std::get<0>(found).contiguous();
    order = std::get<1>(found).contiguous();
    params.dtype = kernel_dtype(grad.scalar_type());
    params.ensemble_size = grad.size(0);
    params.batch = grad.size(1);
    params.num_embeddings = num_embeddings;
    params.dim = dim;
    params.sorted = sorted.const_data_ptr<int64_t>();
    params.order = order.const_data_ptr<int64_t>();
    params.sorted_member_stride = column.dim() == 2 ? params.batch : 0;
    params.grad = static_cast<const char*>(grad.const_data_ptr()) +
                  offset * static_cast<int64_t>(grad.element_size());
    params.grad_member_stride = grad.stride(0);
    params.grad_row_stride = grad.stride(1);
  }

  void run(const char* op, const Tensor& sums) {
    params.sums = sums.mutable_data_ptr();
    launch_cuda(op, sums,
                [&](void* stream) { return ensemble_embedding_cuda::run(params, stream); });
  }
};

// The gradients of the tables that `needs_grad` lists, and of the numeric columns where it lists the
// number of tables.
std::vector<Tensor> scatter(const char* op, const Tensor& grad, const Tensor& categorical,
                            at::IntArrayRef num_embeddings, at::IntArrayRef dims,
                            at::IntArrayRef needs_grad, bool numeric_shared) {
  std::forward_list<Tensor> copies;
  const Tensor& read = with_contiguous_rows(grad, copies);
  const int64_t members = read.size(0), batch = read.size(1);
  c10::SmallVector<EmbeddingTable, 8> entries;
  std::vector<Tensor> grads;
  EmbeddingScatter params{};
  for (const int64_t position : needs_grad) {
    const auto t = static_cast<size_t>(position);
    const int64_t offset = std::accumulate(dims.begin(), dims.begin() + position, int64_t{0});
    if (t == dims.size()) {
      const int64_t features = read.size(2) - offset;
      grads.push_back(numeric_shared ? empty_result({batch, features}, read.options())
                                     : empty_result({members, batch, features}, read.options()));
      params.numeric_grad = grads.back().mutable_data_ptr();
      params.numeric_features = features;
      params.numeric_offset = offset;
      params.numeric_shared = numeric_shared;
      continue;
    }
    if (read.is_cuda()) {
      grads.push_back(at::zeros({members, num_embeddings[t], dims[t]}, read.options()));
      SortedColumn(categorical.select(-1, position), read, num_embeddings[t], dims[t], offset)
          .run(op, grads.back());
      continue;
    }
    grads.push_back(empty_result({members, num_embeddings[t], dims[t]}, read.options()));
    EmbeddingTable entry{};
    entry.grad = grads.back().mutable_data_ptr();
    entry.index = categorical.const_data_ptr<int64_t>() + position * categorical.stride(-1);
    entry.num_embeddings = num_embeddings[t];
    entry.dim = dims[t];
    entry.offset = offset;
    entries.push_back(entry);
  }
  params.dtype = kernel_dtype(read.scalar_type());
  params.ensemble_size = members;
  params.batch = batch;
  params.num_tables = static_cast<int64_t>(entries.size());
  params.tables = entries.data();
  params.index_member_stride = member_stride(categorical);
  params.index_row_stride = categorical.stride(-2);
  params.grad = read.const_data_ptr();
  params.grad_member_stride = read.stride(0);
  params.grad_row_stride = read.stride(1);
  if (read.is_cuda()) {
    launch_cuda(op, read,
                [&](void* stream) { return ensemble_embedding_cuda::run_numeric(params, stream); });
    return grads;
  }
  if (!launch(params)) raise_out_of_range(op, categorical, num_embeddings);
  return grads;
}

Tensor ensemble_embedding(const Tensor& index, const Tensor& weight, bool /*sparse*/) {
  check_embedding(index, weight);
  return gather(kOp, index.unsqueeze(-1), weight, std::nullopt);
}

Tensor ensemble_embedding_backward(const Tensor& grad, const Tensor& index,
                                   int64_t num_embeddings) {
  check_backward(grad, index, num_embeddings);
  return scatter(kOp, grad, index.unsqueeze(-1), num_embeddings, grad.size(2), 0, false)[0];
}

// On CUDA. It waits for the device, to know how many rows there are.
Tensor sparse_backward_cuda(const Tensor& grad, const Tensor& index, int64_t num_embeddings) {
  std::forward_list<Tensor> copies;
  const Tensor& read = with_contiguous_rows(grad, copies);
  const int64_t members = read.size(0), batch = read.size(1), dim = read.size(2);
  SortedColumn column(index, read, num_embeddings, dim, /*offset=*/0);
  const Tensor& sorted = column.sorted;
  Tensor begins = sorted.ge(0).logical_and(sorted.lt(num_embeddings));
  if (batch > 0) {
    const Tensor follows = sorted.narrow(-1, 1, batch - 1).eq(sorted.narrow(-1, 0, batch - 1));
    begins.narrow(-1, 1, batch - 1).logical_and_(follows.logical_not());
  }
  // [E, B], flat: m * B + position.
  const Tensor rows = begins.expand({members, batch}).reshape(-1).nonzero().squeeze(-1);
  const Tensor flat_index = sorted.expand({members, batch}).reshape(-1);
  const Tensor of_member = rows.div(std::max<int64_t>(batch, 1), "floor");
  const Tensor indices = at::stack({of_member, flat_index.index_select(0, rows)});
  const Tensor values = empty_result({rows.size(0), dim}, read.options());
  column.params.rows = rows.const_data_ptr<int64_t>();
  column.params.num_rows = rows.size(0);
  column.run(kOp, values);
  return at::_sparse_coo_tensor_unsafe(indices, values, {members, num_embeddings, dim},
                                       read.options().layout(at::kSparse), /*is_coalesced=*/true);
}

Tensor ensemble_embedding_sparse_backward(const Tensor& grad, const Tensor& index,
                                          int64_t num_embeddings) {
  check_backward(grad, index, num_embeddings);
  if (grad.is_cuda()) return sparse_backward_cuda(grad, index, num_embeddings);
  std::forward_list<Tensor> copies;
  const Tensor& read = with_contiguous_rows(grad, copies);
  const int64_t members = read.size(0), batch = read.size(1), dim = read.size(2);
  // A member's examples row by row; stable, so in ascending order for each row.
  const auto [sorted, order] = at::sort(index, /*stable=*/true, /*dim=*/-1, /*descending=*/false);
  const Tensor used = sorted.contiguous(), examples = order.contiguous();
  const int64_t* used_rows = used.const_data_ptr<int64_t>();
  std::vector<EmbeddingRow> rows;
  std::vector<int64_t> row_numbers;
  for (int64_t m = 0; m < members; ++m) {
    const int64_t begin = index.dim() == 1 ? 0 : m * batch, end = begin + batch;
    if (batch > 0 && (used_rows[begin] < 0 || used_rows[end - 1] >= num_embeddings)) {
      raise_out_of_range(kOp, index.unsqueeze(-1), num_embeddings);
    }
    for (int64_t i = begin; i < end; ++i) {
      if (i == begin || used_rows[i] != used_rows[i - 1]) {
        rows.push_back({m, i, end});
        row_numbers.push_back(used_rows[i]);
        if (i > begin) rows[rows.size() - 2].end = i;
      }
    }
  }
  const auto nnz = static_cast<int64_t>(rows.size());
  Tensor indices = at::empty({2, nnz}, index.options());
  int64_t* coordinates = indices.mutable_data_ptr<int64_t>();
  for (size_t r = 0; r < rows.size(); ++r) {
    coordinates[r] = rows[r].member;
    coordinates[rows.size() + r] = row_numbers[r];
  }
  Tensor values = empty_result({nnz, dim}, read.options());
  EmbeddingRowSums params{};
  params.dtype = kernel_dtype(read.scalar_type());
  params.num_rows = nnz;
  params.dim = dim;
  params.rows = rows.data();
  params.order = examples.const_data_ptr<int64_t>();
  params.grad = read.const_data_ptr();
  params.grad_member_stride = read.stride(0);
  params.grad_row_stride = read.stride(1);
  params.sums = values.mutable_data_ptr();
  launch(params);
  return at::_sparse_coo_tensor_unsafe(indices, values, {members, num_embeddings, dim},
                                       read.options().layout(at::kSparse), /*is_coalesced=*/true);
}

Tensor ensemble_embedding_concat(const Tensor& categorical, TensorList tables,
                                 const OptionalTensor& numeric) {
  check_concat(categorical, tables, numeric);
  return gather(kConcat, categorical, tables, numeric);
}

std::vector<Tensor> ensemble_embedding_concat_backward(
    const Tensor& grad, const Tensor& categorical, at::IntArrayRef num_embeddings,
    at::IntArrayRef dims, at::IntArrayRef needs_grad, bool numeric_shared) {
  check_concat_backward(grad, categorical, c10::fromIntArrayRefSlow(num_embeddings),
                        c10::fromIntArrayRefSlow(dims), needs_grad);
  return scatter(kConcat, grad, categorical, num_embeddings, dims, needs_grad, numeric_shared);
}

// --- shapes for fake tensors ---------------------------------------------------------------------

Tensor ensemble_embedding_meta(const Tensor& index, const Tensor& weight, bool /*sparse*/) {
  check_embedding(index, weight);
  return at::empty_symint({weight.sym_size(0), index.sym_size(-1), weight.sym_size(2)},
                          weight.options());
}

Tensor ensemble_embedding_backward_meta(const Tensor& grad, const Tensor& index,
                                        SymInt num_embeddings) {
  check_backward(grad, index, num_embeddings);
  return at::empty_symint({grad.sym_size(0), num_embeddings, grad.sym_size(2)}, grad.options());
}

Tensor ensemble_embedding_concat_meta(const Tensor& categorical, TensorList tables,
                                      const OptionalTensor& numeric) {
  check_concat(categorical, tables, numeric);
  SymInt features = numeric ? numeric->sym_size(-1) : SymInt(0);
  for (const Tensor& table : tables) features += table.sym_size(2);
  return at::empty_symint({tables[0].sym_size(0), categorical.sym_size(-2), features},
                          tables[0].options());
}

std::vector<Tensor> ensemble_embedding_concat_backward_meta(
    const Tensor& grad, const Tensor& categorical, SymIntArrayRef num_embeddings,
    SymIntArrayRef dims, at::IntArrayRef needs_grad, bool numeric_shared) {
  check_concat_backward(grad, categorical, num_embeddings, dims, needs_grad);
  const SymInt members = grad.sym_size(0), batch = grad.sym_size(1);
  const SymInt columns = std::accumulate(dims.begin(), dims.end(), SymInt(0));
  std::vector<Tensor> grads;
  for (const int64_t position : needs_grad) {
    const auto t = static_cast<size_t>(position);
    c10::SmallVector<SymInt, 3> shape;
    if (t < dims.size()) {
      shape = {members, num_embeddings[t], dims[t]};
    } else if (numeric_shared) {
      shape = {batch, grad.sym_size(2) - columns};
    } else {
      shape = {members, batch, grad.sym_size(2) - columns};
    }
    grads.push_back(at::empty_symint(shape, grad.options()));
  }
  return grads;
}

// --- autograd ------------------------------------------------------------------------------------

// The dispatcher's sizes are symbolic: operations are called as the functions for fake tensors are typed.

constexpr char kBackward[] = "ensemble_embedding_backward";
constexpr char kSparseBackward[] = "ensemble_embedding_sparse_backward";
constexpr char kConcatBackward[] = "ensemble_embedding_concat_backward";

class EmbeddingFunction : public torch::autograd::Function<EmbeddingFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& index, const Tensor& weight,
                        bool sparse) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor output =
        call<ensemble_embedding, kOp>(index, weight, sparse);  // it checks, so it is first
    ctx->save_for_backward({index});
    ctx->saved_data["num_embeddings"] = weight.sym_size(1);
    ctx->saved_data["sparse"] = sparse;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor index = ctx->get_saved_variables()[0];
    const SymInt num_embeddings = ctx->saved_data["num_embeddings"].toSymInt();
    const Tensor& grad = grad_outputs[0];
    return {
        Tensor(),
        ctx->saved_data["sparse"].toBool()
            ? call<ensemble_embedding_backward_meta, kSparseBackward>(grad, index, num_embeddings)
            : call<ensemble_embedding_backward_meta, kBackward>(grad, index, num_embeddings),
        Tensor()};
  }
};

class EmbeddingBackwardFunction : public torch::autograd::Function<EmbeddingBackwardFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& index,
                        const SymInt& num_embeddings) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({index});
    return call<ensemble_embedding_backward_meta, kBackward>(grad, index, num_embeddings);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor index = ctx->get_saved_variables()[0];
    return {call<ensemble_embedding, kOp>(index, grad_outputs[0], false), Tensor(), Tensor()};
  }
};

class ConcatFunction : public torch::autograd::Function<ConcatFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& categorical, TensorList tables,
                        const OptionalTensor& numeric) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor features = call<ensemble_embedding_concat, kConcat>(categorical, tables, numeric);
    ctx->save_for_backward({categorical});
    std::vector<SymInt> num_embeddings, dims;
    for (const Tensor& table : tables) {
      num_embeddings.push_back(table.sym_size(1));
      dims.push_back(table.sym_size(2));
    }
    ctx->saved_data["num_embeddings"] = SymIntArrayRef(num_embeddings);
    ctx->saved_data["dims"] = SymIntArrayRef(dims);
    ctx->saved_data["has_numeric"] = numeric.has_value();
    ctx->saved_data["numeric_shared"] = numeric.has_value() && numeric->dim() == 2;
    return features;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor categorical = ctx->get_saved_variables()[0];
    const auto num_embeddings = ctx->saved_data["num_embeddings"].toSymIntVector();
    const auto dims = ctx->saved_data["dims"].toSymIntVector();
    const size_t tables = dims.size();
    std::vector<int64_t> needs_grad;
    for (size_t t = 0; t < tables + (ctx->saved_data["has_numeric"].toBool() ? 1 : 0); ++t) {
      if (ctx->needs_input_grad(1 + t)) needs_grad.push_back(static_cast<int64_t>(t));
    }
    const auto computed = call<ensemble_embedding_concat_backward_meta, kConcatBackward>(
        grad_outputs[0], categorical, num_embeddings, dims, needs_grad,
        ctx->saved_data["numeric_shared"].toBool());
    variable_list grads(1 + tables + 1);
    for (size_t i = 0; i < needs_grad.size(); ++i) {
      grads[1 + static_cast<size_t>(needs_grad[i])] = computed[i];
    }
    return grads;
  }
};

class ConcatBackwardFunction : public torch::autograd::Function<ConcatBackwardFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& grad, const Tensor& categorical,
                               std::vector<SymInt> num_embeddings, std::vector<SymInt> dims,
                               std::vector<int64_t> needs_grad, bool numeric_shared) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list grads = call<ensemble_embedding_concat_backward_meta, kConcatBackward>(
        grad, categorical, num_embeddings, dims, needs_grad, numeric_shared);
    ctx->save_for_backward({categorical});
    ctx->saved_data["num_embeddings"] = SymIntArrayRef(num_embeddings);
    ctx->saved_data["dims"] = SymIntArrayRef(dims);
    ctx->saved_data["needs_grad"] = needs_grad;
    ctx->saved_data["members"] = grad.sym_size(0);
    ctx->saved_data["features"] = grad.sym_size(2);
    return grads;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor categorical = ctx->get_saved_variables()[0];
    const auto num_embeddings = ctx->saved_data["num_embeddings"].toSymIntVector();
    const auto dims = ctx->saved_data["dims"].toSymIntVector();
    const auto needs_grad = ctx->saved_data["needs_grad"].toIntVector();
    // Zeros, without memory, for what was not asked for.
    const auto options = grad_outputs[0].options();
    const SymInt members = ctx->saved_data["members"].toSymInt();
    SymInt rest = ctx->saved_data["features"].toSymInt();
    std::vector<Tensor> tables;
    for (size_t t = 0; t < dims.size(); ++t) {
      tables.push_back(
          at::zeros({1, 1, 1}, options).expand_symint({members, num_embeddings[t], dims[t]}));
      rest = rest - dims[t];
    }
    Tensor numeric = at::zeros({1, 1}, options).expand_symint({categorical.sym_size(-2), rest});
    for (size_t i = 0; i < needs_grad.size(); ++i) {
      const auto t = static_cast<size_t>(needs_grad[i]);
      (t < tables.size() ? tables[t] : numeric) = grad_outputs[i];
    }
    variable_list grads(6);
    grads[0] = call<ensemble_embedding_concat, kConcat>(categorical, tables, numeric);
    return grads;
  }
};

Tensor ensemble_embedding_autograd(const Tensor& index, const Tensor& weight, bool sparse) {
  return EmbeddingFunction::apply(index, weight, sparse);
}

Tensor ensemble_embedding_backward_autograd(const Tensor& grad, const Tensor& index,
                                            SymInt num_embeddings) {
  return EmbeddingBackwardFunction::apply(grad, index, num_embeddings);
}

Tensor ensemble_embedding_concat_autograd(const Tensor& categorical, TensorList tables,
                                          const OptionalTensor& numeric) {
  return ConcatFunction::apply(categorical, tables, numeric);
}

std::vector<Tensor> ensemble_embedding_concat_backward_autograd(
    const Tensor& grad, const Tensor& categorical, SymIntArrayRef num_embeddings,
    SymIntArrayRef dims, at::IntArrayRef needs_grad, bool numeric_shared) {
  return ConcatBackwardFunction::apply(grad, categorical, num_embeddings.vec(), dims.vec(),
                                       needs_grad.vec(), numeric_shared);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  Operation(m, "ensemble_embedding(Tensor index, Tensor weight, bool sparse) -> Tensor")
      .cpu_and_cuda<ensemble_embedding>()
      .meta<ensemble_embedding_meta>()
      .autograd<ensemble_embedding_autograd>();
  Operation(
      m, "ensemble_embedding_backward(Tensor grad, Tensor index, SymInt num_embeddings) -> Tensor")
      .cpu_and_cuda<ensemble_embedding_backward>()
      .meta<ensemble_embedding_backward_meta>()
      .autograd<ensemble_embedding_backward_autograd>();
  // No shapes for fake tensors: how many rows it has depends on the values of the index.
  Operation(m,
            "ensemble_embedding_sparse_backward(Tensor grad, Tensor index, SymInt num_embeddings)"
            " -> Tensor")
      .cpu_and_cuda<ensemble_embedding_sparse_backward>()
      .not_differentiable();
  Operation(m,
            "ensemble_embedding_concat(Tensor categorical, Tensor[] tables, Tensor? numeric)"
            " -> Tensor")
      .cpu_and_cuda<ensemble_embedding_concat>()
      .meta<ensemble_embedding_concat_meta>()
      .autograd<ensemble_embedding_concat_autograd>();
  Operation(m,
            "ensemble_embedding_concat_backward(Tensor grad, Tensor categorical,"
            " SymInt[] num_embeddings, SymInt[] dims, int[] needs_grad, bool numeric_shared)"
            " -> Tensor[]")
      .cpu_and_cuda<ensemble_embedding_concat_backward>()
      .meta<ensemble_embedding_concat_backward_meta>()
      .autograd<ensemble_embedding_concat_backward_autograd>();
}

}  // namespace pyens
