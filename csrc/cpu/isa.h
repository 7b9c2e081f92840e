// Which instruction set the kernels run with: the best that this processor has, unless a lower one is asked for.
//
// The build passes the list NEARPEAK_ISAS(X), one X(name) per instruction set compiled, simplest first. A family
// declares its table of kernels in each name's namespace, and gathers the tables in that order.
#pragma once

#define NEARPEAK_DECLARE_KERNELS(isa) \
    namespace isa {                   \
    extern const Kernels kernels;     \
    }
#define NEARPEAK_KERNELS_OF(isa) &isa::kernels,

namespace nearpeak {

// The position of the instruction set in force within NEARPEAK_ISAS.
int selected_isa();

}  // namespace nearpeak
