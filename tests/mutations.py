"""One-line faults that the tests must see. tests/test_mutations.py plants each in a copy of the tree.

`old` occurs exactly once in `path`; `killed_by` passes on the tree as it is and fails with the fault planted. Where a
line changes, its mutation changes with it: the list is refused when an old text is gone.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A fault: a text of a file and what stands in its place, and the fast test (a file or a node id) that sees it."""

    path: str
    old: str
    new: str
    killed_by: str
    why: str  # what a user would suffer


MUTATIONS = [
    # Serving: which tokens are computed, and which are chosen
    Mutation(
        path="alpaca/serving/llama/scheduler.py",
        old="bisect.insort(self.waiting, sequence, key=lambda other: other.arrival)",
        new="self.waiting.append(sequence)",
        killed_by="tests/serving/llama/test_scheduler.py::test_a_preempted_sequence_goes_back_to_its_place_by_arrival",
        why="a preempted request waits behind all that came after it",
    ),
    Mutation(
        path="alpaca/serving/llama/scheduler.py",
        old="or candidate.num_in_flight or",
        new="or",
        killed_by="tests/serving/llama/test_scheduler_properties.py",
        why="a request goes on with a token that is not known yet: another answer",
    ),
    Mutation(
        path="alpaca/serving/llama/scheduler.py",
        old="num_missing > self.pool.num_free - len(self.running)",
        new="num_missing > self.pool.num_free",
        killed_by="tests/serving/llama/test_scheduler.py::test_admission_leaves_a_block_for_each_running_sequence",
        why="requests are admitted and preempted at once, and their work is lost",
    ),
    Mutation(
        path="alpaca/serving/llama/scheduler.py",
        old="find_prefix(sequence.token_ids[:-1],",
        new="find_prefix(sequence.token_ids,",
        killed_by="tests/serving/llama/test_scheduler.py::test_a_known_prefix_is_not_computed_again_but_its_last_token_is",
        why="a prompt that is cached whole has no logits, and its request hangs",
    ),
    Mutation(
        path="alpaca/serving/llama/cache.py",
        old="key = (prefix,",
        new="key = (NO_PREFIX,",
        killed_by="tests/serving/llama/test_scheduler_properties.py",
        why="another prompt's keys and values are taken for this one's",
    ),
    Mutation(
        path="alpaca/serving/llama/cache.py",
        old="self._num_holders[block] += 1",
        new="self._num_holders[block] = 1",
        killed_by="tests/serving/llama/test_scheduler_properties.py",
        why="a block is given to a request while another one still reads it",
    ),
    Mutation(
        path="alpaca/serving/llama/scheduler.py",
        old="min(self.num_computed, len(self.token_ids)) // size",
        new="self.num_computed // size",
        killed_by="tests/serving/llama/test_scheduler_properties.py",
        why="answers on a GPU are not found in the cache by the next turn of a conversation",
    ),
    Mutation(
        path="alpaca/serving/llama/scheduler.py",
        old="and sequence.num_generated < sequence.max_new_tokens and",
        new="and",
        killed_by="tests/serving/llama/test_scheduler_properties.py",
        why="every answer costs a step more on a GPU",
    ),
    Mutation(
        path="alpaca/serving/llama/scheduler.py",
        old="return NO_PREFIX - 2 * self.adapter_index - self.is_long",
        new="return NO_PREFIX - self.is_long",
        killed_by="tests/serving/llama/test_scheduler_properties.py",
        why="an adapter's keys and values are taken for another one's",
    ),
    Mutation(
        path="alpaca/serving/llama/scheduler.py",
        old="max(self.num_computed - window + 1, 0)",
        new="max(self.num_computed - window + 1 + pool.block_size, 0)",
        killed_by="tests/serving/llama/test_scheduler_properties.py",
        why="a model with windows reads blocks that another request writes into",
    ),
    Mutation(
        path="alpaca/serving/llama/scheduler.py",
        old="- 2 * self.adapter_index - self.is_long",
        new="- 2 * self.adapter_index",
        killed_by="tests/serving/llama/test_families.py::test_a_longrope_request_is_turned_by_its_final_length",
        why="a long request goes on with keys that were turned for a short one",
    ),
    Mutation(
        path="alpaca/serving/llama/network.py",
        old="window=layer.window, softcap=softcap",
        new="window=layer.window",
        killed_by="tests/serving/llama/test_families.py::test_logits_are_transformers",
        why="Gemma 2 answers without the cap of its scores: slightly other text, and no word of it",
    ),
    Mutation(
        path="alpaca/serving/llama/cache.py",
        old="return self._prefix_of[known]",
        new="return self._last_prefix",
        killed_by="tests/serving/llama/test_scheduler.py::test_two_who_computed_the_same_share_what_follows",
        why="another prompt's keys and values are taken for this one's",
    ),
    Mutation(
        path="alpaca/serving/llama/cache.py",
        old="= key, self._last_prefix",
        new="= key, block",
        killed_by="tests/serving/llama/test_scheduler.py::test_what_followed_a_block_does_not_follow_what_its_room_holds_next",
        why="another prompt's keys and values are taken for this one's",
    ),
    Mutation(
        path="alpaca/serving/llama/sampling.py",
        old="to_tensor(states[0].eos_ids,",
        new="to_tensor(states[0].eos_ids[:1],",
        killed_by="tests/serving/llama/test_sampling.py::test_no_eos_is_chosen_before_min_new_tokens",
        why="Llama 3, with several EOS tokens, ends before min_new_tokens",
    ),
    Mutation(
        path="alpaca/serving/llama/sampling.py",
        old="before < fields.top_p[:, None] * whole",
        new="before <= fields.top_p[:, None] * whole",
        killed_by="tests/serving/llama/test_sampling.py::test_top_p_keeps_the_fewest_that_reach_it",
        why="top_p keeps one token too many",
    ),
    Mutation(
        path="alpaca/serving/llama/sampling.py",
        old='f"{request.seed}:{completion}"',
        new='f"{request.seed}"',
        killed_by="tests/serving/llama/test_sampling.py::test_completions_have_their_own_streams",
        why="all n completions of a request are the same",
    ),
    Mutation(
        path="alpaca/serving/llama/planning.py",
        old='working *= 2 if device == "cuda" else 1',
        new="working *= 1",
        killed_by="tests/serving/llama/test_plan.py::test_a_gpu_holds_the_working_memory_twice",
        why="the server runs out of GPU memory when it captures its graphs",
    ),
    Mutation(
        path="alpaca/serving/detokenize.py",
        old="end = min(found)",
        new="end = max(found)",
        killed_by="tests/serving/test_detokenize.py::test_random_stops_equal_cutting_the_whole_text",
        why="text after the first stop string is sent",
    ),
    Mutation(
        path="alpaca/serving/request.py",
        old="(le is not None and not value <= le)",
        new="(le is not None and not value < le)",
        killed_by="tests/serving/test_request.py::test_every_bound_is_checked",
        why="the largest value that the schema allows is refused",
    ),
    Mutation(
        path="alpaca/serving/request.py",
        old="(inputs.total_tokens or max_context) - prompt_length",
        new="(inputs.total_tokens or max_context)",
        killed_by="tests/serving/test_request.py::test_limits",
        why="total_tokens does not count the prompt",
    ),
    Mutation(
        path="alpaca/text/prompts.py",
        old='if input == "":',
        new="if not input.strip():",
        killed_by="tests/text/test_prompts.py::test_only_an_empty_input_is_none",
        why="prompts differ from those the model was trained on",
    ),
    # Serving: kernels and their twins
    Mutation(
        path="alpaca/serving/kernels/ops.py",
        old="out=rotated_second).addcmul_(first, sin)",
        new="out=rotated_second).addcmul_(first, sin, value=-1)",
        killed_by="tests/serving/kernels/test_ops.py::test_the_rotation_is_transformers",
        why="every answer is nonsense",
    ),
    Mutation(
        path="alpaca/serving/kernels/ops.py",
        old="torch.arange(length, device=device) <= last_seen",
        new="torch.arange(length, device=device) < last_seen",
        killed_by="tests/serving/kernels/test_ops.py::test_attention_is_naive_attention",
        why="a prompt that is read in chunks does not see its own tokens",
    ),
    Mutation(
        path="alpaca/serving/kernels/triton_linear.py",
        old="elements % 2 == 0, both >> 4, both & 15",
        new="elements % 2 == 0, both & 15, both >> 4",
        killed_by="tests/serving/kernels/test_triton_linear.py::test_dequantised_bit_for_bit",
        why="nf4 weights are swapped in pairs on a GPU",
    ),
    Mutation(
        path="alpaca/serving/kernels/low_rank.py",
        old="narrow.masked_fill_(rows.others(num_adapters)",
        new="narrow.masked_fill_(~rows.others(num_adapters)",
        killed_by="tests/serving/kernels/test_triton_low_rank.py::test_the_twin_is_the_formula",
        why="a request is answered with every adapter but its own",
    ),
    # Conversion
    Mutation(
        path="alpaca/formats/meta/sharding.py",
        old="weight.view(num_heads, rows // num_heads // 2, 2, width)",
        new="weight.view(num_heads, 2, rows // num_heads // 2, width)",
        killed_by="tests/formats/meta/test_convert_llama_weights_to_hf.py::test_logits_equal_metas_forward",
        why="the rotary permutation is lost: a converted model talks nonsense",
    ),
    Mutation(
        path="alpaca/architecture/tensors.py",
        old='"lm_head", "output", 0)',
        new='"lm_head", "output", 1)',
        killed_by="tests/formats/meta/test_convert_llama_weights_to_hf.py::test_any_number_of_shards_gives_the_same_bytes",
        why="shards of the head are joined along the wrong axis",
    ),
    Mutation(
        path="alpaca/architecture/inventory.py",
        old="if unknown:",
        new="if not expected:",
        killed_by="tests/architecture/test_inventory.py::test_further_layers_are_counted",
        why="half a model is served without a word",
    ),
    Mutation(
        path="alpaca/formats/meta/checkpoint.py",
        old="if found[path] != md5",
        new="if len(found[path]) != len(md5)",
        killed_by="tests/formats/meta/test_convert_llama_weights_to_hf.py::test_damaged_file_is_named_and_nothing_written",
        why="a damaged download is converted",
    ),
    Mutation(
        path="alpaca/formats/hf/merging.py",
        old="alpha=change.scale",
        new="alpha=1.0",
        killed_by="tests/formats/hf/test_merging.py::test_the_tensors_are_pefts_after_its_merge",
        why="an adapter is merged with another strength than it was trained with",
    ),
    Mutation(
        path="alpaca/formats/hf/quantization.py",
        old="scaled.round_()",
        new="scaled.trunc_()",
        killed_by="tests/formats/hf/test_quantization.py::test_int8_is_within_half_a_step",
        why="int8 weights are all too small",
    ),
    Mutation(
        path="alpaca/formats/gguf/model.py",
        old="if len(shape) == 1:",
        new="if not shape:",
        killed_by="tests/formats/gguf/test_export_gguf.py::test_tensors_are_metas_own",
        why="llama.cpp refuses the norms' type",
    ),
    Mutation(
        path="alpaca/formats/diff/residual.py",
        old="-(coded & 1)",
        new="(coded & 1)",
        killed_by="tests/formats/diff/test_weight_diff.py::test_any_bits_come_back",
        why="a recovered model is not the tuned one",
    ),
    # Files
    Mutation(
        path="alpaca/files/atomic.py",
        old="            fsync(target.parent)",
        new="            pass",
        killed_by="tests/files/test_atomic.py::test_everything_in_a_folder_is_on_the_disk_before_it_takes_its_name",
        why="after a power cut the finished model is not there",
    ),
    Mutation(
        path="alpaca/files/atomic.py",
        old='for entry in [*partial.rglob("*"), partial]',
        new="for entry in [partial]",
        killed_by="tests/files/test_atomic.py::test_everything_in_a_folder_is_on_the_disk_before_it_takes_its_name",
        why="after a power cut a finished model has empty files",
    ),
    Mutation(
        path="alpaca/files/atomic.py",
        old="os.fsync(file.fileno())",
        new="pass",
        killed_by="tests/files/test_atomic.py::test_a_file_is_on_the_disk_before_it_takes_its_name",
        why="after a power cut a file is empty",
    ),
    Mutation(
        path="alpaca/formats/hf/writing.py",
        old="os.fsync(file.fileno())",
        new="pass",
        killed_by="tests/files/test_atomic.py::test_each_weights_file_is_on_the_disk",
        why="a full or failing disk is noticed only after the rename",
    ),
    Mutation(
        path="alpaca/training/checkpoints/final.py",
        old="    fsync(output_dir)",
        new="    pass",
        killed_by="tests/files/test_atomic.py::test_a_final_model_is_on_the_disk_file_by_file_its_config_last",
        why="after a power cut the trained model is not there",
    ),
    Mutation(
        path="alpaca/training/checkpoints/final.py",
        old="key=lambda path: path.name in WHOLE",
        new="key=lambda path: path.name not in WHOLE",
        killed_by="tests/files/test_atomic.py::test_a_final_model_is_on_the_disk_file_by_file_its_config_last",
        why="a run that is killed leaves old and new files that look like a model",
    ),
    Mutation(
        path="alpaca/data/generation/journal.py",
        old="os.fsync(self._file.fileno())",
        new="pass",
        killed_by="tests/files/test_atomic.py::test_a_journal_and_each_of_its_lines_are_on_the_disk",
        why="answers that were paid for are lost in a power cut",
    ),
    Mutation(
        path="alpaca/files/downloads.py",
        old='f"bytes={have}-"',
        new='f"bytes={have + 1}-"',
        killed_by="tests/files/test_downloads.py::test_a_broken_connection_is_gone_on_with",
        why="a download is never gone on with, or lacks a byte",
    ),
    Mutation(
        path="alpaca/files/downloads.py",
        old="if digest.hexdigest() != address.sha256",
        new="if not digest.hexdigest()",
        killed_by="tests/files/test_downloads.py::test_the_digest_is_checked",
        why="other weights than asked for are served",
    ),
    Mutation(
        path="alpaca/files/archives.py",
        old='or ".." in parts',
        new='or "..." in parts',
        killed_by="tests/files/test_archives.py::test_members_that_leave_their_folder",
        why="an archive's paths lead out of its folder",
    ),
    # Training
    Mutation(
        path="alpaca/data/examples.py",
        old="labels[: self.prompt_lengths[index]]",
        new="labels[: self.prompt_lengths[index] - 1]",
        killed_by="tests/data/test_examples.py::test_hostile_and_sample_examples_equal_the_original",
        why="the prompt's last token carries loss",
    ),
    Mutation(
        path="alpaca/data/batching.py",
        old="manual_seed((seed << 20) + epoch)",
        new="manual_seed(seed << 20)",
        killed_by="tests/data/test_batching.py::test_a_permutation_depends_on_seed_and_epoch_only",
        why="every epoch has the same order",
    ),
    Mutation(
        path="alpaca/training/gradients.py",
        old="* math.ceil(len(indices) / run.settings",
        new="* math.floor(len(indices) / run.settings",
        killed_by="tests/training/test_loop.py::test_losses_equal_a_plain_implementation",
        why="the loss of an incomplete batch is scaled wrongly",
    ),
    Mutation(
        path="alpaca/training/model/optimizer.py",
        old="learning_rate / (1 - beta1**step)",
        new="learning_rate",
        killed_by="tests/training/model/test_optimizer.py::test_in_float32_it_is_torchs",
        why="the first steps are ten times too small",
    ),
    Mutation(
        path="alpaca/training/model/optimizer.py",
        old='1 - learning_rate * group["weight_decay"]',
        new='1 - group["weight_decay"]',
        killed_by="tests/training/model/test_optimizer.py::test_in_float32_it_is_torchs",
        why="weight decay is thousands of times too strong",
    ),
    Mutation(
        path="alpaca/training/schedule.py",
        old="return step / num_warmup_steps",
        new="return (step + 1) / num_warmup_steps",
        killed_by="tests/training/test_config.py::test_schedules_are_those_of_transformers",
        why="the learning rate is another than the recipe's",
    ),
    Mutation(
        path="alpaca/training/checkpoints/loading.py",
        old='torch.set_rng_state(state["cpu"])',
        new='state["cpu"]',
        killed_by="tests/training/checkpoints/test_checkpoint.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit",
        why="a resumed run is not the uninterrupted one",
    ),
    Mutation(
        path="alpaca/training/checkpoints/digests.py",
        old="if found != expected:",
        new="if not found:",
        killed_by="tests/training/checkpoints/test_checkpoint.py::test_a_damaged_checkpoint_is_skipped_with_the_file_named",
        why="a damaged checkpoint is trained on",
    ),
    Mutation(
        path="alpaca/training/planning/footprint.py",
        old="return 2 * setup.state_bytes * count_trained(shape, setup)",
        new="return setup.state_bytes * count_trained(shape, setup)",
        killed_by="tests/training/planning/test_training_plan.py::test_parts_of_a_known_model",
        why="the plan forgets one of AdamW's moments, and the run ends out of memory",
    ),
]
