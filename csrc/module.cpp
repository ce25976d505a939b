// The Python module alrao_fast._C. Importing it runs the static registrations of every op's
// kernels; the schemas are defined in Python (alrao_fast/ops). Its own functions are what touches
// no tensor.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <string>

#include "common/cpu/isa.h"
#include "feature/optimizers.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(alrao::cpu::isa_name(alrao::cpu::selected_isa()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <class Options>
std::string table_of(const char* op) {
  std::string text = std::string(op) + ":";
  for (const char* state : Options::kStates) text += std::string(" ") + state;
  for (const auto& option : Options::table())
    text += std::string(option.is_number() ? ", float " : ", bool ") + option.name;
  return text + "\n";
}

PyObject* feature_tables(PyObject*, PyObject*) {
  std::string text;
#define ALRAO_TABLE(stem, Options) text += table_of<Options>(#stem "_");
  ALRAO_OPTIMIZERS(ALRAO_TABLE)
#undef ALRAO_TABLE
  return PyUnicode_FromString(text.c_str());
}

// Whether the objects in some lists, and the keys and values of some dicts, are those of these
// addresses, in order; a 0 ends each container. Addresses in one array, since a call of Python's
// for each would take longer than the comparison; whoever made it keeps the objects alive.
PyObject* same_objects(PyObject*, PyObject* arguments) {
  PyObject* containers;
  const char* addresses;
  Py_ssize_t bytes;
  if (!PyArg_ParseTuple(arguments, "O!y#", &PyTuple_Type, &containers, &addresses, &bytes))
    return nullptr;
  const auto* next = reinterpret_cast<const uintptr_t*>(addresses);
  const auto* const end = next + bytes / sizeof(uintptr_t);
  const auto is_next = [&](const PyObject* object) {
    return next < end && *next++ == reinterpret_cast<uintptr_t>(object);
  };
  const Py_ssize_t count = PyTuple_Size(containers);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* container = PyTuple_GetItem(containers, i);
    if (PyDict_Check(container)) {
      PyObject *key, *value;
      for (Py_ssize_t position = 0; PyDict_Next(container, &position, &key, &value);)
        if (!is_next(key) || !is_next(value)) Py_RETURN_FALSE;
    } else if (!PyList_Check(container)) {
      PyErr_SetString(PyExc_TypeError, "containers: expected lists and dicts");
      return nullptr;
    } else {
      const Py_ssize_t size = PyList_Size(container);
      for (Py_ssize_t k = 0; k < size; ++k)
        if (!is_next(PyList_GetItem(container, k))) Py_RETURN_FALSE;
    }
    if (!is_next(nullptr)) Py_RETURN_FALSE;
  }
  return PyBool_FromLong(next == end);
}

// The attribute `grad` of each object in a list, but for None.
PyObject* gradients(PyObject*, PyObject* params) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  if (!PyList_Check(params)) {
    PyErr_SetString(PyExc_TypeError, "params: expected a list");
    return nullptr;
  }
  const Py_ssize_t size = PyList_Size(params);
  PyObject* found = PyList_New(0);
  for (Py_ssize_t i = 0; found && i < size; ++i) {
    PyObject* grad = PyObject_GetAttr(PyList_GetItem(params, i), name);
    const bool failed = !grad || (grad != Py_None && PyList_Append(found, grad) < 0);
    Py_XDECREF(grad);
    if (failed) Py_CLEAR(found);
  }
  return found;
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS,
     "Name of the instruction set that the CPU kernels use on this machine."},
    {"feature_tables", feature_tables, METH_NOARGS,
     "The states and options of every feature optimizer, in order, a line each."},
    {"same_objects", same_objects, METH_VARARGS,
     "Whether the lists, and the dicts by keys and values, hold exactly the objects of these ids."},
    {"gradients", gradients, METH_O,
     "The attribute `grad` of each object in a list, but for None."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
