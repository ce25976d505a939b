#include "feature/plan.h"

#include <unordered_map>
#include <utility>

#include "feature/optimizers.h"

namespace alrao {
namespace {

OpNames find_op(const std::string& op) {
#define ALRAO_FIND(stem, Options) \
  if (op == #stem "_") return op_names<Options>(#stem "_");
  ALRAO_OPTIMIZERS(ALRAO_FIND)
#undef ALRAO_FIND
  fail("_feature_plan", "got op ", op, ", expected one of a feature optimizer");
}

struct PlanTable {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<MultiTensor>> plans;
  int64_t next = 1;
};

PlanTable& plan_table() {
  static auto* table = new PlanTable;  // never destroyed: tensors may outlive static destruction
  return *table;
}

void feature_plan_options(int64_t number, std::vector<double> options) {
  const auto plan = find_plan(number);
  const std::lock_guard<std::mutex> lock(plan->mutex);
  plan->options = std::move(options);
}

// The op _feature_plan_gradients, for kernels that are started elsewhere: writes the gradients'
// addresses; how many of them are of copies, which stay until _feature_plan_release, or -1 where a
// tensor is no longer what the plan saw. Unboxed by hand, as run_plan.
void feature_plan_gradients(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const auto number = to<int64_t>(stack[0]);
  const HandleList grads(stack[1]);
  const auto addresses = to<Tensor>(stack[2]);
  const auto plan = find_plan(number);
  const std::lock_guard<std::mutex> lock(plan->mutex);
  const auto& records = plan->records();
  const bool fits = addresses.is_cpu() && addresses.is_contiguous() &&
                    dtype_of(addresses.get()) == aoti_torch_dtype_int64() &&
                    addresses.numel() == static_cast<int64_t>(records.size());
  if (!fits)
    fail(plan->op(), "addresses has ", text(shape_of(addresses.get())),
         ", expected a contiguous int64 vector on the CPU with ", records.size(), " entries");
  int64_t copies = -1;
  if (plan->unchanged()) {
    copies = plan->bind(grads.handles());
    auto* const found = static_cast<int64_t*>(data_of(addresses.get()));
    for (size_t t = 0; t < records.size(); ++t)
      found[t] = reinterpret_cast<int64_t>(records[t].grad);
  }
  stack[0] = torch::stable::detail::from(copies);
}

void feature_plan_release(int64_t number) {
  const auto plan = find_plan(number);
  const std::lock_guard<std::mutex> lock(plan->mutex);
  plan->release();
}

void feature_plan_free(int64_t number) {
  PlanTable& table = plan_table();
  std::shared_ptr<MultiTensor> last;  // released after the lock
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.plans.find(number);
  if (found == table.plans.end()) return;
  last = std::move(found->second);
  table.plans.erase(found);
}

}  // namespace

int64_t feature_plan(const std::string& op, const std::vector<Tensor>& tensors, int64_t num_params,
                     int64_t num_states, bool masters, bool averages, std::vector<int64_t> inners,
                     std::vector<int64_t> seeds, const Tensor& steps) {
  OpNames names = find_op(op);
  const auto given = static_cast<int64_t>(tensors.size());
  const auto most = static_cast<int64_t>(names.states.size());
  if (num_params < 0 || num_states < 0 || num_states > most ||
      given != num_params * (num_states + 2 + masters + averages)) {
    fail(op, "_feature_plan got ", given, " tensors, expected ", num_params,
         " parameters, each with ", num_states, " states", masters ? ", a master" : "",
         averages ? ", an average" : "", " and a rate");
  }
  auto next = tensors.begin();
  const auto take = [&] {
    const auto first = next;
    next += num_params;
    return std::vector<Tensor>(first, next);
  };
  TensorLists lists;
  lists.params = take();
  for (int64_t k = 0; k < num_states; ++k) lists.states.push_back(take());
  if (masters) lists.masters = take();
  if (averages) lists.averages = take();
  lists.rates = take();
  lists.inners = std::move(inners);
  lists.seeds = std::move(seeds);
  lists.steps = steps;
  auto plan = std::make_shared<MultiTensor>(std::move(names), std::move(lists));

  PlanTable& table = plan_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  table.plans.emplace(table.next, std::move(plan));
  return table.next++;
}

std::shared_ptr<MultiTensor> find_plan(int64_t number) {
  PlanTable& table = plan_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.plans.find(number);
  if (found == table.plans.end())
    fail("_feature_plan", "got plan ", number,
         ", expected one that _feature_plan returned and "
         "nobody freed");
  return found->second;
}

// Of tensors of any device.
STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CompositeExplicitAutograd, m) {
  m.impl("_feature_plan", TORCH_BOX(&feature_plan));
  m.impl("_feature_plan_options", TORCH_BOX(&feature_plan_options));
  m.impl("_feature_plan_free", TORCH_BOX(&feature_plan_free));
  m.impl("_feature_plan_gradients", feature_plan_gradients);
  m.impl("_feature_plan_release", TORCH_BOX(&feature_plan_release));
}

}  // namespace alrao
