# SPDX-License-Identifier: Apache-2.0
"""What of vLLM's configuration is known not to change KV. Data only; whatever is not here counts (effective.py).

Differences of rounding do not count: vLLM itself lets requests of one engine meet through its prefix cache whatever
kernel, batch or graph computed each block.
"""

from __future__ import annotations

import re

__all__ = ["ENVIRONMENT_NOT_COUNTED", "NOT_COUNTED"]

# Class -> reason -> its fields. A field that the installed vLLM does not have is one of another release.
NOT_COUNTED: dict[str, dict[str, str]] = {
    "VllmConfig": {
        "decides when tokens are computed": "scheduler_config",
        "where data lies": "offload_config",
        "part of the layout": "device_config",
        "sampling and output": "structured_outputs_config reasoning_config watermark_config aux_output_config",
        "watching": "observability_config logging_config profiler_config kv_events_config watchdog_config",
        "moves data": "kv_transfer_config ec_transfer_config ec_manager_config weight_transfer_config",
        "made from what counts": "quant_config",
        "kernels and graphs": "optimization_level performance_mode",
        "counts for models with states": "mamba_config",
        "of a run": "instance_id shutdown_timeout",
    },
    "ModelConfig": {
        "the weights' content counts": "model model_weights revision seed word_embeddings_untied_by_checkpoint",
        "the values count, after all overrides": "hf_config hf_text_config hf_config_path config_format hf_overrides",
        "counts where the model's positions or scales depend on it": "max_model_len spec_target_max_model_len",
        "keys hold token ids": "tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init",
        "names, places and rights": "served_model_name trust_remote_code allowed_local_media_path "
        "allowed_media_domains hf_token is_submodel_config",
        "kernels and graphs": "enforce_eager disable_cascade_attn enable_cumem_allocator",
        "sampling and output": "max_logprobs logprobs_mode logits_processors generation_config "
        "override_generation_config use_fp64_gumbel return_sampling_mask enable_trace_replay io_processor_plugin "
        "renderer_num_workers",
        "such requests are not cached": "runner convert pooler_config enable_prompt_embeds "
        "enable_return_routed_experts",
        "keeps or loses KV as a whole": "enable_sleep_mode sleep_mode_backend sleep_mode_offload_cudagraph "
        "sleep_preserve_parameter_names enable_nccl_comm_suspend",
    },
    "MultiModalConfig": {
        "how many and how large, not what": "limit_per_prompt mm_encoder_only skip_mm_profiling",
        "identifiers of other kinds never meet": "mm_hasher_algorithm",
        "where data lies": "mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb "
        "mm_tensor_ipc mm_ipc_gpu_memory_gb mm_encoder_tp_mode",
        "kernels and graphs": "mm_encoder_attn_backend",
        "keys hold token ids": "interleave_mm_strings",
        "output": "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin",
    },
    "CacheConfig": {
        "part of the layout": "block_size user_specified_block_size _block_size_resolved kv_cache_layout "
        "effective_attention_block_size hash_block_size cpu_kvcache_space_bytes",
        "part of the namespace": "cache_dtype",
        "how much fits": "gpu_memory_utilization num_gpu_blocks_override num_gpu_blocks num_cpu_blocks "
        "kv_cache_memory_bytes kv_cache_size_tokens kv_cache_max_concurrency swap_space cpu_offload_gb "
        "kv_offloading_size kv_offloading_backend simple_cpu_offload_num_blocks",
        "what the engine keeps itself": "enable_prefix_caching prefix_caching_hash_algo prefix_match_unit "
        "prefix_cache_retention_interval cache_hit_alignment_tokens",
        "counts for models with states": "mamba_cache_dtype mamba_ssm_cache_dtype",
        "where states lie, and which the engine keeps itself": "is_attention_free mamba_page_size_padded "
        "skip_page_size_padded mamba_block_size mamba_cache_mode enable_mamba_shared_prefix_checkpoint",
        "such models are not cached": "replayssm_buffer_len use_replayssm use_kda_recoverssm",
    },
    "ParallelConfig": {
        "part of a shard's name": "tensor_parallel_size pipeline_parallel_size world_size rank",
        "which engine of several": "data_parallel_size data_parallel_size_local data_parallel_rank "
        "data_parallel_rank_local data_parallel_index data_parallel_master_ip data_parallel_rpc_port "
        "data_parallel_master_port data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb "
        "dp_sync_interval nnodes node_rank master_addr master_port _data_parallel_master_port_list _coord_store_port "
        "_api_process_count _api_process_rank assigned_physical_gpu_ids",
        "who computes which part, and how it is gathered": "is_moe_model enable_hc_sp enable_expert_parallel "
        "enable_batch_sharded_sampling enable_ep_weight_filter enable_eplb eplb_config expert_placement_strategy "
        "max_parallel_loading_workers disable_custom_all_reduce enable_shm_tensor_arena enable_elastic_ep "
        "elastic_ep_max_dp_size enable_dbo ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold "
        "disable_nccl_for_dp_synchronization",
        "processes": "ray_workers_use_nsight ray_runtime_env placement_group distributed_executor_backend "
        "worker_extension_cls numa_bind numa_bind_nodes numa_bind_cpus distributed_timeout_seconds "
        "cpu_distributed_timeout_seconds enable_fault_tolerance fault_tolerance_config",
        "context parallel KV is not cached": "prefill_context_parallel_size decode_context_parallel_size "
        "dcp_kv_cache_interleave_size dcp_comm_backend dcp_q_replicate cp_kv_cache_interleave_size "
        "_allow_auto_resolve_cp_interleave_size",
    },
    "LoadConfig": {
        "where files are, how they are read": "download_dir device use_tqdm_on_load pt_load_map_location "
        "safetensors_prefetch_num_threads safetensors_prefetch_block_size",
    },
    "AttentionConfig": {
        "kernels and graphs": "backend backend_per_kind minimax_m3_msa_decode_backend flash_attn_version "
        "flash_attn_max_num_splits_for_cuda_graph tokenspeed_mla_min_split_kv tq_max_kv_splits_for_cuda_graph "
        "use_trtllm_attention mla_prefill_backend trtllm_ragged_backend indexer_tp_shard_min_rows "
        "minimax_m3_indexer_cp sparse_mla_force_mqa sparse_mla_prefill_workspace_factor flex_attn_block_m "
        "flex_attn_block_n flex_attn_q_block_size flex_attn_kv_block_size",
    },
    "EngramConfig": {"where data lies": "cpu_offload embedding_across_dp dp_shared_memory use_thp"},
    "KernelConfig": {
        "kernels and graphs": "ir_op_priority enable_flashinfer_autotune enable_rocm_segmented_attn_autotune "
        "enable_cutedsl_warmup enable_jit_warmup sparse_indexer_topk_backend monokernel",
    },
    "LoRAConfig": {
        "keys hold the adapter's content": "max_lora_rank max_loras max_cpu_loras max_lora_cls_labels default_mm_loras",
        "kernels and graphs": "fully_sharded_loras specialize_active_lora",
        "counts where it is not the model's": "lora_dtype",
    },
    "SpeculativeConfig": {
        "names and places": "model revision code_revision",
        "the draft's configuration counts as a model's": "quantization tensor_parallel_size "
        "draft_tensor_parallel_size draft_parallel_config max_model_len",
        "the engine's own": "target_model_config target_parallel_config",
        "kernels and graphs": "enforce_eager moe_backend attention_backend disable_padded_drafter_batch "
        "use_local_argmax_reduction",
        "which drafts are tried and taken": "prompt_lookup_max prompt_lookup_min "
        "num_speculative_tokens_per_batch_size suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests "
        "suffix_decoding_max_spec_factor suffix_decoding_min_token_prob rejection_sample_method "
        "synthetic_acceptance_rates synthetic_acceptance_length enable_adaptive_verification draft_sample_method "
        "fly_window_size fly_entropy_threshold fly_entropy_top_k",
    },
    "CompilationConfig": {
        "kernels and graphs": "mode backend custom_ops ir_enable_torch_wrap splitting_ops compile_mm_encoder "
        "cudagraph_mm_encoder encoder_cudagraph_token_budgets encoder_cudagraph_max_vision_items_per_batch "
        "encoder_cudagraph_max_frames_per_batch cudagraph_decoder_replay decoder_replay_cudagraph_capture_sizes "
        "decoder_replay_trim_threshold compile_sizes compile_ranges_endpoints inductor_compile_config cudagraph_mode "
        "cudagraph_num_of_warmups cudagraph_capture_sizes cudagraph_copy_inputs cudagraph_specialize_lora "
        "use_inductor_graph_partition pass_config max_cudagraph_capture_size dynamic_shapes_config fast_moe_cold_start",
        "of a run": "debug_dump_path cache_dir compile_cache_save_format local_cache_dir enabled_custom_ops "
        "disabled_custom_ops traced_files compilation_time encoder_compilation_time static_forward_context "
        "static_all_moe_layers bs_to_padded_graph_size",
    },
}  # fmt: skip

# Of the variables for which vLLM compiles anew (the others never count).
_ENVIRONMENT = """
    VLLM_ADAPTIVE_VERIFICATION_* VLLM_ALLOW_* VLLM_ALLREDUCE_* VLLM_BUILD_* VLLM_CHAT_TEMPLATE_* VLLM_COMPILE_CACHE_*
    VLLM_COMPUTE_NANS_IN_LOGITS VLLM_CONFIGURE_LOGGING VLLM_CPU_ATTN_SPLIT_KV VLLM_CPU_CI_ENV
    VLLM_CPU_NUM_OF_RESERVED_CPU VLLM_CPU_OMP_THREADS_BIND VLLM_CUDART_SO_PATH VLLM_CUSTOM_SCOPES_* VLLM_DBO_*
    VLLM_DEBUG_* VLLM_DEEPEP_BUFFER_SIZE_MB VLLM_DISABLE_COMPILE_CACHE VLLM_DISABLE_LOG_LOGO VLLM_DISABLE_PYNCCL
    VLLM_DISABLE_REQUEST_ID_RANDOMIZATION VLLM_DISABLE_SHARED_EXPERTS_STREAM VLLM_DISTRIBUTED_* VLLM_DOCKER_* VLLM_DP_*
    VLLM_EC_SIDE_* VLLM_ELASTIC_EP_* VLLM_ENABLE_COHERE_API VLLM_ENABLE_CUDAGRAPH_GC VLLM_ENABLE_INDUCTOR_*
    VLLM_ENABLE_RESPONSES_API_STORE VLLM_ENFORCE_* VLLM_ENGINE_* VLLM_FASTSAFETENSORS_* VLLM_GC_DEBUG VLLM_GPT_OSS_*
    VLLM_GPU_NIC_* VLLM_GPU_SYNC_CHECK VLLM_IMAGE_TAG VLLM_KV_CACHE_LAYOUT VLLM_KV_EVENTS_* VLLM_KV_OFFLOAD_* VLLM_LOG_*
    VLLM_LOOPBACK_IP VLLM_LORA_* VLLM_MAX_* VLLM_MEMORY_PROFILER_* VLLM_MOONCAKE_* VLLM_MQ_* VLLM_MSGPACK_* VLLM_NCCL_*
    VLLM_NIC_* VLLM_NIXL_* VLLM_NVTX_* VLLM_P2P_* VLLM_PATTERN_MATCH_DEBUG VLLM_PLUGINS VLLM_PP_LAYER_PARTITION
    VLLM_PROCESS_NAME_PREFIX VLLM_RAISE_* VLLM_RAY_* VLLM_REGEX_* VLLM_ROCM_SLEEP_* VLLM_RUST_* VLLM_SKIP_*
    VLLM_SPARSE_INDEXER_MAX_LOGITS_MB VLLM_SYSTEM_START_DATE VLLM_TARGET_DEVICE VLLM_TOOL_* VLLM_TRACE_FUNCTION
    VLLM_USAGE_* VLLM_USE_AOT_COMPILE VLLM_USE_BREAKABLE_CUDAGRAPH VLLM_USE_BYTECODE_HOOK VLLM_USE_EXPERIMENTAL_*
    VLLM_USE_FASTOKENS VLLM_USE_FLASHINFER_SAMPLER VLLM_USE_MEGA_AOT_ARTIFACT VLLM_USE_PRECOMPILED* VLLM_USE_RAY_*
    VLLM_USE_RUST_* VLLM_USE_SIMPLE_KV_OFFLOAD VLLM_USE_SPINLOOP_EXT VLLM_USE_STANDALONE_COMPILE
    VLLM_USE_V2_MODEL_RUNNER VLLM_V1_USE_OUTLINES_CACHE VLLM_WEIGHT_OFFLOADING_* VLLM_WSL2_* VLLM_XGRAMMAR_* VLLM_XLA_*
"""
ENVIRONMENT_NOT_COUNTED = re.compile("|".join(name.replace("*", ".*") for name in _ENVIRONMENT.split()))
