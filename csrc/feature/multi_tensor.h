// Many tensors in one pass: what the feature optimizers share and what knows no equation.
//
// A plan describes the tensors that stay from step to step (parameters, states, masters, rates)
// once: they are checked, and cut into pieces of about equal cost. A step then brings only the
// gradients.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "feature/handles.h"
#include "feature/record.h"

namespace alrao {

using torch::stable::Tensor;

// What messages call an op and the lists of its states.
struct OpNames {
  std::string op;
  std::vector<const char*> states;
};

template <class Options>
OpNames op_names(const char* op) {
  return {op, {Options::kStates.begin(), Options::kStates.end()}};
}

// The tensors of an op's list arguments, before anything is checked.
struct TensorLists {
  std::vector<Tensor> params;
  std::vector<std::vector<Tensor>> states;
  std::vector<Tensor> masters;   // empty, or one each; one without elements stands for none
  std::vector<Tensor> averages;  // the same
  std::vector<Tensor> rates;
  std::vector<int64_t> inners;
  std::vector<int64_t> seeds;  // empty: round to nearest
  std::optional<Tensor> steps;
};

// Scalars that live in tensors, so that schedulers and loss scalers need not synchronise.
struct ScalarTensors {
  std::optional<Tensor> lr;
  std::optional<Tensor> grad_scale;
  std::optional<Tensor> found_inf;
};

class MultiTensor {
 public:
  // Throws, naming the argument, if the tensors do not fit together.
  MultiTensor(OpNames names, TensorLists lists);

  const std::string& op() const { return names_.op; }
  int64_t num_states() const { return static_cast<int64_t>(lists_.states.size()); }
  const std::vector<FeatureRecord>& records() const { return records_; }
  int32_t device_type() const { return device_type_; }
  int32_t device_index() const { return device_index_; }
  // On the tensors' device.
  int64_t* steps() const { return steps_; }

  // Throws unless there are `expected` states per parameter, as many as the options need `because`
  // they are what they are.
  void check_states(int64_t expected, const char* because) const;

  // Whether the tensors still are what the plan saw: same memory, dtype and shape.
  bool unchanged() const;

  // Checks the gradients and points the records at them, through copies where the strides differ
  // from the parameter's: how many. The gradients must outlive the update, on a GPU until it is
  // queued.
  int64_t bind(const std::vector<AtenTensorHandle>& grads);

  // Lets go of the copies.
  void release() { copies_.clear(); }

  // Tensors on the CPU: takes the steps into the records, and what values weigh in averages then.
  void read_steps(double averaging);

  // The same: body(record, begin, end) for every piece, in parallel. Which pieces there are does
  // not depend on the number of threads.
  template <class Body>
  void for_each_piece(const Body& body) const {
    const auto tasks = static_cast<int64_t>(task_starts_.size()) - 1;
    const auto run = [&](int64_t first, int64_t last) {
      for (int64_t i = task_starts_[first]; i < task_starts_[last]; ++i)
        body(records_[pieces_[i].tensor], pieces_[i].begin, pieces_[i].end);
    };
    if (tasks <= serial_tasks_) {
      run(0, tasks);
    } else {
      torch::stable::parallel_for(0, tasks, serial_tasks_, run);
    }
  }

  // The same: counts the update.
  void count_steps();

  // Held during a step: a plan has one set of gradients.
  std::mutex mutex;

  // The op's numbers that seldom change, for planned steps. They are kept here because parsing them
  // from Python costs as much as updating thousands of entries.
  std::vector<double> options;

  // What the tensors' backend keeps with them.
  std::shared_ptr<void> attachment;

 private:
  struct Piece {
    int64_t tensor, begin, end;
  };
  struct Seen {
    AtenTensorHandle handle;
    void* data;
    int64_t numel;
  };

  void check_lists() const;
  bool is_here(AtenTensorHandle tensor) const;
  void add_record(int64_t t);
  void check_strided(const std::string& name, AtenTensorHandle tensor) const;
  void see(const Tensor& tensor);
  void check_overlap() const;
  void cut();
  Shape param_shape(size_t t) const;

  OpNames names_;
  TensorLists lists_;
  int32_t device_type_ = 0, device_index_ = 0;
  std::vector<FeatureRecord> records_;
  std::vector<Seen> seen_;  // the parameters first
  std::vector<int32_t> dtypes_;
  std::vector<int64_t> shapes_;        // per parameter: its sizes, then its strides
  std::vector<int64_t> shape_starts_;  // and one past the last
  std::vector<Piece> pieces_;
  std::vector<int64_t> task_starts_;  // pieces [task_starts_[k], task_starts_[k + 1]) are task k
  int64_t serial_tasks_ = 1;          // so many take less time than waking another thread
  int64_t* steps_ = nullptr;
  std::vector<Tensor> copies_;
};

}  // namespace alrao
