// What the files of this folder that are compiled once for each instruction set share: with SFK_ISA, the name of the
// set, and its flags.  Kernels are in anonymous namespaces (two instruction sets must never share a function); what a
// file gives to the table is in the namespace of the set.
#pragma once
#include "../../params.h"

#ifndef SFK_ISA
#define SFK_ISA generic
#endif

#define SFK_TEXT(name) #name
#define SFK_NAME(name) SFK_TEXT(name)

// `kernel` for either compute dtype as the function `name`.
#define SFK_KERNEL(name, kernel, Params)                                                 \
  namespace sfk::SFK_ISA {                                                               \
  void name(const Params& p) { p.f64 ? sfk::kernel<double>(p) : sfk::kernel<float>(p); } \
  }
