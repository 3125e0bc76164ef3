// Calls of cells that are programs: arguments checked, outputs made, the call run without the GIL.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdexcept>

#include "calls.h"
#include "cpu/machine/call.h"

namespace fusedrnn {
namespace {

// numbers: int32 (n,), as fusedrnn.cells.program writes them; start and constants: lists of numbers.
std::shared_ptr<const cpu::MachinePlan> py_machine_plan(const py::object& numbers, std::vector<double> start,
                                                        std::vector<double> constants) {
  const View a = array_view(numbers, "numbers");
  if (a.ndim != 1) throw RefusedValue("numbers: expected one axis, got " + a.text());
  const std::int32_t* data = need<std::int32_t>(numbers, "numbers", {a.shape[0]});
  try {
    return std::make_shared<const cpu::MachinePlan>(data, std::size_t(a.shape[0]), std::move(start),
                                                    std::move(constants));
  } catch (const std::invalid_argument& error) {
    throw RefusedValue(error.what());
  }
}

using PlanPtr = std::shared_ptr<const cpu::MachinePlan>;

struct PyPackedMachine : OfDtype<PackedMachinePtr> {
  PlanPtr plan;
  Index I, H, P;
  std::vector<py::object> weights;
};

struct PyMachineTape : OfDtype<MachineTapePtr>, OwnProblem {
  PlanPtr plan;
  py::object x, y;
  std::vector<py::object> weights, state0, scalars;
  py::object packed = py::none();  // kept for boundary states only, which run forward again
};

void need_count(const std::vector<py::object>& given, const char* name, std::size_t count) {
  if (given.size() != count)
    throw RefusedValue(std::string(name) + ": expected " + std::to_string(count) + " entries, got " +
                       std::to_string(given.size()));
}

// then(index, name, rows, columns) for each weight of a plan; columns 0: it has one axis.
template <class Then>
void each_weight(const cpu::MachinePlan& plan, Index I, Index H, Index P, Then&& then) {
  static const char* const names[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};
  for (std::size_t k = 0; k < cpu::MachinePlan::kPlain; ++k)
    then(k, names[k], plan.blocks[k] * H, k == 0 ? I : k == 1 ? P : 0);
  for (std::size_t k = 0; k < plan.parameters.size(); ++k)
    then(cpu::MachinePlan::kPlain + k, "parameter", plan.parameters[k] * H, Index(0));
  if (plan.projects) then(std::size_t(plan.weight_hr()), "weight_hr", P, H);
}

// Biases may be missing, and whatever has no rows.
template <class T>
MachineWeights<const T> machine_weights(const cpu::MachinePlan& plan, const std::vector<py::object>& given, Index I,
                                        Index H, Index P) {
  MachineWeights<const T> found(given.size());
  each_weight(plan, I, H, P, [&](std::size_t k, const char* name, Index rows, Index columns) {
    const bool optional = k == cpu::MachinePlan::bias_ih || k == cpu::MachinePlan::bias_hh || !rows;
    if (optional && given[k].is_none()) return;
    found[k] = columns ? need<T>(given[k], name, {rows, columns}) : need<T>(given[k], name, {rows});
  });
  return found;
}

struct MachineSizes {
  Index I, H, P;
};

// By weight_ih, an array of two axes, and the rows of weight_hr.
MachineSizes machine_sizes(const cpu::MachinePlan& plan, const std::vector<py::object>& weights) {
  const View a = array_view(weights[0], "weight_ih");
  const Index gates = plan.blocks[cpu::MachinePlan::weight_ih];
  if (!a.shape[1] || a.shape[0] < gates) throw RefusedValue("weight_ih: expected (G*H, I), got " + a.text());
  const Index I = a.shape[1], H = a.shape[0] / gates;
  return {I, H, projected_size(plan.projects, weights.back(), H)};  // weight_hr is the last one
}

template <class T>
std::unique_ptr<PyPackedMachine> pack_machine_as(const PlanPtr& plan, const std::vector<py::object>& given) {
  const auto [I, H, P] = machine_sizes(*plan, given);
  const MachineWeights<const T> weights = machine_weights<T>(*plan, given, I, H, P);
  auto packed = std::make_unique<PyPackedMachine>();
  packed->plan = plan, packed->I = I, packed->H = H, packed->P = P, packed->weights = given;
  packed->slot(T()) =
      without_gil([&] { return pack_machine<T>(*plan, packed->I, packed->H, packed->P, weights, signals()); });
  return packed;
}

std::unique_ptr<PyPackedMachine> py_machine_pack(const PlanPtr& plan, const std::vector<py::object>& weights) {
  need_count(weights, "weights", plan->weights());
  return (is_float32(weights[0], "weight_ih", 2) ? pack_machine_as<float> : pack_machine_as<double>)(plan, weights);
}

// An entry for each state: arrays (B, ·), or (T, B, ·) of `every` step, or None. The first state has P units.
template <class T>
std::vector<const T*> of_states(const std::vector<py::object>& given, const char* name, int states, const Sizes& n,
                                bool every) {
  std::vector<const T*> found(std::size_t(states), nullptr);
  if (given.empty()) return found;
  need_count(given, name, std::size_t(states));
  for (std::size_t s = 0; s < found.size(); ++s) {
    const Index width = s ? n.H : n.P;
    found[s] = every ? maybe<T>(given[s], name, {n.T, n.B, width}) : maybe<T>(given[s], name, {n.B, width});
  }
  return found;
}

// Of each row scalar (T, B).
template <class T>
std::vector<const T*> of_rows(const std::vector<py::object>& given, const cpu::MachinePlan& plan, Shape shape) {
  std::vector<const T*> found;
  need_count(given, "scalars", std::size_t(plan.scalars));
  for (const py::object& one : given) found.push_back(need<T>(one, "scalars", shape));
  return found;
}

// As many to be made as there are states, where they are wanted.
std::vector<py::object> new_states(int states, bool wanted) {
  return std::vector<py::object>(std::size_t(wanted ? states : 0));
}

// The memory of outputs: of the arrays that the caller gave, or of new ones; null where there is none.
template <class T>
std::vector<T*> state_outputs(std::vector<py::object>& out, int states, const Sizes& n, bool every) {
  std::vector<T*> found(std::size_t(states), nullptr);
  if (out.empty()) return found;
  need_count(out, "states", std::size_t(states));
  for (std::size_t s = 0; s < out.size(); ++s) {
    const Index width = s ? n.H : n.P;
    found[s] = every ? output<T>(out[s], "state", {n.T, n.B, width}) : output<T>(out[s], "state", {n.B, width});
  }
  return found;
}

// Of a call; the plan may only read masks that there are.
Regularization machine_regularization(const cpu::MachinePlan& plan, const PyRegularization& given) {
  const Regularization r = regularization_of(given, true);
  const bool there[] = {r.drops(), r.zoneout_h > 0, r.zoneout_c > 0};
  for (int k = 0; k < 3; ++k)
    if (plan.reads_masks[k] && !there[k]) throw RefusedValue("plan: expected one without this mask");
  return r;
}

const Problem& machine_problem(OwnProblem& owner, const cpu::MachinePlan& plan, const Sizes& sizes,
                               const Options& options) {
  problem_of(owner, CellId(0), sizes, {options.lengths, options.reset, options.reverse, options.detach_every});
  owner.problem.regularization = machine_regularization(plan, options.regularization);
  return owner.problem;
}

// The memory of a tape in an array (T*B, width) of the caller's.
template <class T>
T* machine_memory(const py::object& o, const cpu::MachinePlan& plan, const Sizes& n) {
  return const_cast<T*>(need<T>(o, "tape", {n.T * n.B, tape_width(plan, n.H)}));
}

struct MachineOutputs {
  py::object y;
  std::vector<py::object> stateT, states;
};

// Where `saved` is an array of the caller's, what backward needs goes there.
template <class T>
std::unique_ptr<PyMachineTape> machine_run_as(const PyPackedMachine& packed, const PlanPtr& plan_of_call,
                                              const py::object& x, const std::vector<py::object>& state0,
                                              const std::vector<py::object>& scalars, const Options& options,
                                              MachineOutputs& out, Save save, const py::object& saved) {
  const cpu::MachinePlan& plan = *plan_of_call;
  if (!plan.same_weights(*packed.plan)) throw RefusedValue("plan: expected one of the cell that was packed");
  const Time n = time_of(x);
  auto tape = std::make_unique<PyMachineTape>();
  MachineForwardCall<T> call{};
  call.plan = &plan, call.packed = packed.get(T());
  if (!call.packed) throw RefusedType("x: expected the dtype of the weights");
  if (packed.I != n.I) throw RefusedValue("x: expected " + std::to_string(packed.I) + " features");
  const Sizes sizes = {n.T, n.B, n.I, packed.H, packed.P};
  call.problem = machine_problem(*tape, plan, sizes, options);
  call.x = sequence<T>(x, "x", {n.T, n.B, n.I});
  call.scalars = of_rows<T>(scalars, plan, {n.T, n.B});
  call.state0 = of_states<T>(state0, "state0", plan.states, sizes, false);
  call.y = output<T>(out.y, "y", {n.T, n.B, sizes.P});
  call.stateT = state_outputs<T>(out.stateT, plan.states, sizes, false);
  call.states = state_outputs<T>(out.states, plan.states, sizes, true);
  call.save = save, call.poll = signals();
  if (!saved.is_none()) call.saved = machine_memory<T>(saved, plan, call.problem.sizes);
  tape->slot(T()) = without_gil([&] { return machine_forward<T>(call); });
  return tape;
}

template <class T>
py::tuple machine_forward_as(const py::object& packed_object, const PlanPtr& plan_of_call, const py::object& x,
                             const std::vector<py::object>& state0, const Options& options, bool return_states,
                             Save save, const std::vector<py::object>& scalars) {
  const PyPackedMachine& packed = packed_object.cast<const PyPackedMachine&>();
  MachineOutputs out{{}, new_states(packed.plan->states, true), new_states(packed.plan->states, return_states)};
  auto tape = machine_run_as<T>(packed, plan_of_call, x, state0, scalars, options, out, save, py::none());
  py::object kept = py::none();
  if (save != Save::nothing) {
    if (save == Save::boundary_states) tape->packed = packed_object;
    tape->plan = plan_of_call, tape->x = x, tape->y = out.y, tape->weights = packed.weights, tape->state0 = state0;
    tape->scalars = scalars;
    kept = py::cast(std::move(tape));
  }
  return py::make_tuple(out.y, py::tuple(py::cast(out.stateT)),
                        return_states ? py::object(py::tuple(py::cast(out.states))) : py::object(py::none()), kept);
}

py::tuple py_machine_forward(const py::object& packed, const PlanPtr& plan, const py::object& x,
                             const std::vector<py::object>& state0, const py::object& lengths, const py::object& reset,
                             bool reverse, Index detach_every, const PyRegularization& regularization,
                             bool return_states, int save_id, const std::vector<py::object>& scalars) {
  if (!py::isinstance<PyPackedMachine>(packed))
    throw py::type_error("packed: expected what machine_pack returned, got " + type_name(packed));
  return (is_float32(x, "x", 3) ? machine_forward_as<float>
                                : machine_forward_as<double>)(packed, plan, x, state0,
                                                              {lengths, reset, reverse, detach_every, regularization},
                                                              return_states, save_of(save_id), scalars);
}

// Gradients of x, of each weight, of the initial states and of each row scalar.
struct MachineGradients {
  py::object dx;
  std::vector<py::object> dweights, dstate0, dscalars;
};

template <class T>
void machine_backward_as(const PyMachineTape& tape, const py::object& dy, const std::vector<py::object>& dstateT,
                         const std::vector<py::object>& dstates, MachineGradients& out) {
  const cpu::MachinePlan& plan = *tape.plan;
  const Sizes& n = tape.problem.sizes;
  MachineBackwardCall<T> call{};
  call.plan = &plan, call.tape = tape.get(T()), call.problem = tape.problem;
  if (!tape.packed.is_none()) call.packed = tape.packed.cast<const PyPackedMachine&>().get(T());
  call.weights = machine_weights<T>(plan, tape.weights, n.I, n.H, n.P);
  call.x = sequence<T>(tape.x, "x", {n.T, n.B, n.I});
  call.y = const_cast<T*>(need<T>(tape.y, "y", {n.T, n.B, n.P}));
  call.scalars = of_rows<T>(tape.scalars, plan, {n.T, n.B});
  call.state0 = of_states<T>(tape.state0, "state0", plan.states, n, false);
  call.dy = maybe<T>(dy, "dy", {n.T, n.B, n.P});
  call.dstateT = of_states<T>(dstateT, "dstateT", plan.states, n, false);
  call.dstates = of_states<T>(dstates, "dstates", plan.states, n, true);
  call.dx = output<T>(out.dx, "dx", {n.T, n.B, n.I});
  need_count(out.dweights, "gradients of weights", tape.weights.size());
  call.dweights.assign(tape.weights.size(), nullptr);
  each_weight(plan, n.I, n.H, n.P, [&](std::size_t k, const char* name, Index rows, Index columns) {
    if (tape.weights[k].is_none()) out.dweights[k] = py::none();
    call.dweights[k] =
        columns ? output<T>(out.dweights[k], name, {rows, columns}) : output<T>(out.dweights[k], name, {rows});
  });
  call.dstate0 = state_outputs<T>(out.dstate0, plan.states, n, false);
  need_count(out.dscalars, "gradients of scalars", tape.scalars.size());
  for (py::object& one : out.dscalars) call.dscalars.push_back(output<T>(one, "scalars", {n.T, n.B}));
  call.poll = signals();
  without_gil([&] { machine_backward<T>(call); });
}

py::tuple py_machine_backward(const PyMachineTape& tape, const py::object& dy, const std::vector<py::object>& dstateT,
                              const std::vector<py::object>& dstates, const std::vector<bool>& needed) {
  // x, each weight, the initial states, each row scalar
  const std::size_t count = tape.weights.size(), rows = tape.scalars.size();
  if (needed.size() != count + 2 + rows)
    throw RefusedValue("need: expected " + std::to_string(count + 2 + rows) + " flags");
  MachineGradients out{{},
                       std::vector<py::object>(count),
                       new_states(tape.plan->states, needed[count + 1]),
                       std::vector<py::object>(rows)};
  if (!needed[0]) out.dx = py::none();
  for (std::size_t k = 0; k < count; ++k)
    if (!needed[k + 1]) out.dweights[k] = py::none();
  for (std::size_t k = 0; k < rows; ++k)
    if (!needed[count + 2 + k]) out.dscalars[k] = py::none();
  (tape.f32 ? machine_backward_as<float> : machine_backward_as<double>)(tape, dy, dstateT, dstates, out);
  return py::make_tuple(out.dx, out.dweights,
                        needed[count + 1] ? py::object(py::tuple(py::cast(out.dstate0))) : py::object(py::none()),
                        out.dscalars);
}

// Forward with nothing kept: all that backward needs is in arrays of the caller's. `tape` is None where nothing is
// saved.
void py_machine_run_forward(const PyPackedMachine& packed, const PlanPtr& plan, const py::object& x,
                            const std::vector<py::object>& state0, const std::vector<py::object>& scalars,
                            const py::object& lengths, const py::object& reset, bool reverse, Index detach_every,
                            const PyRegularization& regularization, const py::object& y,
                            const std::vector<py::object>& stateT, const std::vector<py::object>& states,
                            const py::object& tape) {
  MachineOutputs out{y, stateT, states};
  (is_float32(x, "x", 3) ? machine_run_as<float>
                         : machine_run_as<double>)(packed, plan, x, state0, scalars,
                                                   {lengths, reset, reverse, detach_every, regularization}, out,
                                                   tape.is_none() ? Save::nothing : Save::all, tape);
}

// Backward of machine_run_forward: from the same arguments, its results, and gradients of them to the outputs.
template <class T>
void machine_run_backward_as(PyMachineTape& tape, const Options& options, const py::object& saved, const py::object& dy,
                             const std::vector<py::object>& dstateT, const std::vector<py::object>& dstates,
                             MachineGradients& out) {
  const Time n = time_of(tape.x);
  const auto [I, H, P] = machine_sizes(*tape.plan, tape.weights);
  const Sizes& sizes = machine_problem(tape, *tape.plan, {n.T, n.B, n.I, H, P}, options).sizes;
  tape.slot(T()) = machine_tape_over<T>(*tape.plan, sizes, machine_memory<T>(saved, *tape.plan, sizes));
  machine_backward_as<T>(tape, dy, dstateT, dstates, out);
}

void py_machine_run_backward(const PlanPtr& plan, const std::vector<py::object>& weights, const py::object& x,
                             const std::vector<py::object>& state0, const std::vector<py::object>& scalars,
                             const py::object& lengths, const py::object& reset, bool reverse, Index detach_every,
                             const PyRegularization& regularization, const py::object& y, const py::object& saved,
                             const py::object& dy, const std::vector<py::object>& dstateT,
                             const std::vector<py::object>& dstates, const py::object& dx,
                             const std::vector<py::object>& dweights, const std::vector<py::object>& dstate0,
                             const std::vector<py::object>& dscalars) {
  PyMachineTape tape;
  tape.plan = plan, tape.x = x, tape.y = y, tape.weights = weights, tape.state0 = state0, tape.scalars = scalars;
  need_count(weights, "weights", plan->weights());
  MachineGradients out{dx, dweights, dstate0, dscalars};
  (is_float32(weights[0], "weight_ih", 2)
       ? machine_run_backward_as<float>
       : machine_run_backward_as<double>)(tape, {lengths, reset, reverse, detach_every, regularization}, saved, dy,
                                          dstateT, dstates, out);
}

void define_machine(py::module_& m) {
  py::class_<cpu::MachinePlan, std::shared_ptr<cpu::MachinePlan>>(m, "MachinePlan", "A cell as programs.")
      .def("tape_width", &tape_width, py::arg("H"), "Columns of the array that machine_run_forward takes for a tape.");
  py::class_<PyPackedMachine>(m, "PackedMachine", "Weights of such a cell in the kernels' own order.");
  py::class_<PyMachineTape>(m, "MachineTape", "What forward of such a cell saved for backward.")
      .def_property_readonly("bytes",
                             [](const PyMachineTape& t) { return t.f32 ? tape_bytes(*t.f32) : tape_bytes(*t.f64); })
      .def_property_readonly("sizes", [](const PyMachineTape& t) { return sizes_of(t); });
  py::list operations;
#define X(name, count) operations.append(#name);
#include "cpu/machine/operations.def"
#undef X
  m.attr("MACHINE_OPERATIONS") = py::tuple(operations);
  using Limits = cpu::MachineLimits;  // of what a cell's forward function shows
  py::dict limits;
  limits["operations"] = Limits::operations, limits["states"] = Limits::states;
  limits["accumulators"] = Limits::accumulators, limits["vectors"] = Limits::vectors;
  m.attr("MACHINE_LIMITS") = limits;
  m.def("machine_plan", &py_machine_plan, py::arg("numbers"), py::arg("start"), py::arg("constants"));
  m.def("machine_pack", &py_machine_pack, py::arg("plan").none(false), py::arg("weights"));
  m.def("machine_forward", &py_machine_forward, py::arg("packed"), py::arg("plan").none(false), py::arg("x"),
        py::arg("state0"), py::arg("lengths"), py::arg("reset"), py::arg("reverse"), py::arg("detach_every"),
        py::arg("regularization"), py::arg("return_states"), py::arg("save"), py::arg("scalars"));
  m.def("machine_backward", &py_machine_backward, py::arg("tape"), py::arg("dy"), py::arg("dstateT"),
        py::arg("dstates"), py::arg("need"));
  m.def("machine_run_forward", &py_machine_run_forward, py::arg("packed"), py::arg("plan").none(false), py::arg("x"),
        py::arg("state0"), py::arg("scalars"), py::arg("lengths"), py::arg("reset"), py::arg("reverse"),
        py::arg("detach_every"), py::arg("regularization"), py::arg("y"), py::arg("stateT"), py::arg("states"),
        py::arg("tape"));
  m.def("machine_run_backward", &py_machine_run_backward, py::arg("plan").none(false), py::arg("weights"), py::arg("x"),
        py::arg("state0"), py::arg("scalars"), py::arg("lengths"), py::arg("reset"), py::arg("reverse"),
        py::arg("detach_every"), py::arg("regularization"), py::arg("y"), py::arg("tape"), py::arg("dy"),
        py::arg("dstateT"), py::arg("dstates"), py::arg("dx"), py::arg("dweights"), py::arg("dstate0"),
        py::arg("dscalars"));
}

}  // namespace
}  // namespace fusedrnn
