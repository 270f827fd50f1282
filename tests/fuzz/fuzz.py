"""Coverage-guided fuzzing of one target: `make fuzz`, or fuzz.py TARGET FOLDER [libFuzzer's options].

FOLDER keeps the inputs that reached new code, for the next run. An exception, more than SLOW_S of processor time or
more than MOST_MB of memory ends the run, and leaves the input in FOLDER-found.
"""
import resource
import sys
import time
import traceback
from pathlib import Path

import atheris

SLOW_S, MOST_MB = 2, 300

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]


def memory_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(name, folder, *options):
    # Little besides the service's own code, for speed.
    with atheris.instrument_imports(include=["app", "werkzeug" if name == "uploads" else "PIL"]):
        import targets
        run, seeds = targets.TARGETS[name]
        for seed in seeds():
            run(seed)  # imports what is imported late
    corpus, found = Path(folder) / name, Path(f"{folder}-found")
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    for i, seed in enumerate(seeds()):
        (corpus / f"seed-{i}").write_bytes(seed)
    most_mb = memory_mb() + MOST_MB

    def test_one(data):
        started = time.process_time()
        try:
            run(data)
            seconds = time.process_time() - started
            assert seconds <= SLOW_S, f"took {seconds:.1f} s"
            assert memory_mb() <= most_mb, f"took more than {MOST_MB} MB"
        except Exception:
            traceback.print_exc(file=sys.stdout)  # standard error is closed, see below
            raise

    def mutate(data, max_size, seed):
        return targets.with_correct_checksums(atheris.Mutate(data, max_size))[:max_size]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={found}/{name}-", "-timeout=30", "-max_len=20000",
                   "-rss_limit_mb=4096", "-print_final_stats=1", "-close_fd_mask=2",  # libtiff complains a lot
                   *options], test_one, custom_mutator=mutate)
    atheris.Fuzz()


main(*sys.argv[1:])
