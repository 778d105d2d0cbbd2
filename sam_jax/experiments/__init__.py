"""Many runs: grids, engines that run them, their results, reports, pictures."""
