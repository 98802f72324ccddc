// What every instruction set provides. cpu/isa.cpp asks the processor once and forwards each op to the best one.
#pragma once

#include "ops/attention.h"
#include "ops/info_nce.h"
#include "ops/last_token_pool.h"
#include "ops/qk_norm_rope.h"
#include "ops/rms_norm.h"
#include "ops/shingles.h"
#include "ops/swiglu.h"
#include "ops/top_k.h"

#define QEMB_DECLARE_KERNELS(isa) \
    namespace qemb::cpu::isa { \
    void attention_forward(const AttentionForward& p); \
    void attention_backward(const AttentionBackward& p); \
    void last_token_pool_forward(const LastTokenPoolForward& p); \
    void last_token_pool_backward(const LastTokenPoolBackward& p); \
    void info_nce(const InfoNce& p); \
    void top_k(const TopK& p); \
    void rms_norm_forward(const RmsNormForward& p); \
    void rms_norm_backward(const RmsNormBackward& p); \
    void qk_norm_rope_forward(const QkNormRopeForward& p); \
    void qk_norm_rope_backward(const QkNormRopeBackward& p); \
    void swiglu_forward(const SwigluForward& p); \
    void swiglu_backward(const SwigluBackward& p); \
    void shingles(const Shingles& p); \
    void min_hash(const MinHash& p); \
    }

QEMB_DECLARE_KERNELS(generic)
QEMB_DECLARE_KERNELS(avx2)
QEMB_DECLARE_KERNELS(avx512)
