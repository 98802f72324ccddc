// The parts of pyqemb._C, one for each op.
#pragma once

#include "bindings/tensor_view.h"

namespace qemb {

void bind_attention(py::module_& m);
void bind_info_nce(py::module_& m);
void bind_last_token_pool(py::module_& m);
void bind_qk_norm_rope(py::module_& m);
void bind_rms_norm(py::module_& m);
void bind_shingles(py::module_& m);
void bind_swiglu(py::module_& m);
void bind_top_k(py::module_& m);

}  // namespace qemb
