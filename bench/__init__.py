"""fastenc's benchmarks: ops against their floors, models against their peers, in one run."""
