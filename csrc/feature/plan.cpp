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

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) { m.impl("_feature_plan", TORCH_BOX(&feature_plan)); }

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CompositeExplicitAutograd, m) {
  m.impl("_feature_plan_options", TORCH_BOX(&feature_plan_options));
  m.impl("_feature_plan_free", TORCH_BOX(&feature_plan_free));
}

}  // namespace alrao
