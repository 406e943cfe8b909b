"""What `make test` leaves to `make test-slow`, and why: the one list of slow tests. conftest.py marks them.

A file maps to {test: reason}; the test "*" is the whole file. Every area keeps fast tests of its own in `make test`.
Beside these, grid.py marks the contract suite's Triton interpreter and KeOps parts: seconds a call, ten a formula.
"""

_PROCESS = "starts Python processes, three seconds each"
_MEMORY = "measures peak memory of large problems in fresh processes"
_BENCH = "runs contenders of the benchmarks"
_COMPILES = "KeOps compiles a formula for ten seconds where its cache is cold"
_PICTURES = "writes whole figures"
_FULL_DISK = "one run of reproduce after the other"

# Of these, what takes minutes by itself, the longest first: it has to start first where two processes share the list.
FIRST = (
    *("test_the_contract", "test_all_cases", "test_a_dry_run_from_a_plain_checkout", "test_the_site", "test_two_ranks"),
    "test_scikit_learn",
)

SLOW = {
    "test_network_outputs.py": {
        "test_a_sketch_is_unbiased_and_knows_its_error": "two hundred seeds; other tests look at twenty",
    },
    "test_solution.py": {
        "test_the_residual_is_that_of_the_points": "many fits against float64 residuals",
    },
    "test_gram.py": {
        "test_the_guard_bounds_the_loss": "compares the estimate with the loss on many problems",
        "test_small_memory_in_float32": _MEMORY,
    },
    "test_rfm.py": {
        "test_scikit_learn": "all checks of scikit-learn; test_estimators.py runs them on Deep RFM",
    },
    "test_median_bandwidth.py": {
        "test_scikit_learn": "all checks of scikit-learn, on a median bandwidth",
    },
    "test_rfm_tree.py": {
        "test_scikit_learn": "all checks of scikit-learn, twenty seconds",
    },
    "test_rfm_search.py": {
        "test_scikit_learn": "all checks of scikit-learn; test_estimators.py runs them on Deep RFM",
        "test_jobs_do_not_matter": _PROCESS,
    },
    "test_damage.py": {
        "test_images_of_another_dtype_are_refused_before_they_are_read": "writes large images",
    },
    "test_integrations.py": {
        "test_without_xrfm": _PROCESS,
    },
    "test_kernel_matrix.py": {
        "test_process_settings_survive": _PROCESS,
    },
    "test_threads.py": {
        "test_measures_of_one_model_in_six_threads": "runs six threads to the end",
        "test_a_fork_during_a_call_leaves_the_child_free": _PROCESS,
    },
    "test_reproduce.py": {
        "test_an_interrupted_run_resumes": _FULL_DISK,
        "test_gaps_are_drawn_as_gaps": _FULL_DISK,
    },
    "test_reproduce_draw.py": {
        "test_a_pdf_has_its_fonts_inside_as_outlines": _PICTURES,
        "test_eigenvectors": _PICTURES,
    },
    "test_cancellation.py": {
        "test_small_and_large_numbers_in_float32": "sums in long double",
        "test_random_problems": "sums in long double",
        "test_centring_with_wide_bandwidths": "sums in long double for 24 problems",
    },
    "test_network.py": {
        "test_memory_holds_no_jacobian": _MEMORY,
        "test_convolutional_trunks": "measures whole VGG and ResNet trunks",
    },
    "test_machine_code.py": {
        "test_every_launch": "compiles for sm_80 and sm_90, seconds a configuration",
        "test_further_profiles": "compiles for sm_80 and sm_90, seconds a configuration",
        "test_kernels_that_are_not_radial": "compiles for sm_80 and sm_90, seconds a configuration",
        "test_an_odd_n": "compiles for sm_80 and sm_90, seconds a configuration",
        "test_old_configurations_are_found": "compiles for sm_80 and sm_90, seconds a configuration",
    },
    "test_module.py": {
        "test_exports_and_compiles": "exports and compiles a module",
    },
    "test_memory_and_refusals.py": {
        "test_every_rank_knows_the_least_room_and_what_was_altered": "starts ranks with torchrun",
        "test_the_gradient_form_keeps_to_its_limit": "profiles the memory of calls; test_agop.py has smaller ones",
        "test_weights_that_are_stored_count_for_the_copy": "profiles the memory of calls",
    },
    "test_locks.py": {
        "test_races": "starts writers and readers that race for a folder",
    },
    "test_checkpoint.py": {
        "test_kill_and_resume": _PROCESS,
    },
    "test_agop.py": {"test_peak_memory": _MEMORY},
    "test_bench.py": {
        "test_suite": _BENCH,
        "test_a_process_of_its_own_measures": _PROCESS,
        "test_other_cases_take_n": _BENCH,
        "test_pytest_benchmarks": _BENCH,
        "test_report": _BENCH,
        "test_agop_takes_n_and_d": _BENCH,
        "test_a_full_disk_is_one_line_and_leaves_the_old_result": _BENCH,
        "test_from_another_folder": _PROCESS,
    },
    "test_cg.py": {
        "test_peak_memory": _MEMORY,
        "test_hard_problems": "iterates to the end on problems that do not converge",
    },
    "test_diagonal.py": {"test_memory_grows_with_d_only": _MEMORY},
    "test_distributed.py": {
        "test_two_ranks": "starts ranks with torchrun, which work through rank_cases.py",
        "test_shares_of_nothing_and_lost_ranks": "starts ranks, kills one and waits for the others' timeout",
    },
    "test_site.py": {"*": "builds the documentation, whose examples run"},
    "test_first_contact.py": {
        "test_a_dry_run_from_a_plain_checkout": "all parts of a first contact on the CPU, a minute",
        "test_what_is_installed_is_not_asked_for": _PROCESS,
        "test_a_module_compiles_to_one_graph": "loads torch's compiler",
    },
    "test_autograd.py": {
        "test_the_operator_is_torchs": "torch's own checks of an operator load its compiler",
        "test_compiles_without_a_break": "loads torch's compiler",
        "test_finite_differences_twice": "second differences of four kernels",
    },
    "test_spectrum.py": {"test_intervals_hold_what_they_promise": "intervals of some hundred data sets"},
    "test_errors.py": {"test_a_script_is_named": _PROCESS},
    "test_families.py": {
        "test_keops": _COMPILES,
        "test_keops_at_extreme_bandwidths": _COMPILES,
        "test_keops_says_what_leaves_the_dtype": _COMPILES,
    },
    "test_keops.py": {
        "test_against_the_reference": _COMPILES,
        "test_further_kernels": _COMPILES,
        "test_self_pairs_and_duplicates_contribute_nothing": _COMPILES,
        "test_few_rows": _COMPILES,
        "test_outputs_in_chunks": _COMPILES,
        "test_blocks_of_evaluation_points": _COMPILES,
        "test_extreme_bandwidths": _COMPILES,
        "test_conjugate_gradients": _COMPILES,
        # test_a_call_prints_nothing and test_nothing_to_do stay: one formula
    },
    "test_packaging.py": {"*": "builds wheels and installs them into fresh environments"},
    "test_readme.py": {"test_the_kernel_that_docs_add": _PROCESS},
    "test_reproduce_files.py": dict.fromkeys(
        (
            "test_a_flipped_record_is_found",
            "test_files_that_may_not_grow",
            "test_output_that_takes_no_more",
            "test_a_full_disk_is_one_line_and_the_run_resumes",
            "test_results_name_no_folder_of_this_machine",
        ),
        _FULL_DISK,
    ),
    "test_reproduce_networks.py": {
        "test_runs_are_shared": _FULL_DISK,
        "test_networks_have_the_papers_shapes": "builds networks of the papers' sizes",
        "test_convolutional_networks_train_and_measure": "trains convolutional networks",
        "test_an_interrupted_run_resumes_with_the_same_numbers": _FULL_DISK,
    },
    "test_search.py": {"test_a_random_search_finds_nothing": "500 random calls against sums in long double"},
    "test_solve.py": {"test_peak_memory": _MEMORY},
    "test_tables.py": {"test_plot": "loads matplotlib, a second", "test_contenders_learn": _BENCH},
    "test_triton.py": {
        "test_all_cases": "Triton's interpreter takes seconds a call",
        "test_the_contract": "Triton's interpreter takes seconds a call",
    },
}
