"""Generate text with a base model and, optionally, an adapter.

    python -m workloads.generate prompt="Once upon a time"
    python -m workloads.generate main="A passage." prompts="[Who is it?, Where is it?]" max_new_tokens=32
    python -m workloads.generate lora_path=runs/demo-HASH/adapter data_path=in.jsonl output_path=out.jsonl
    python -m workloads.generate lora_path=runs/demo-HASH/adapter data_path="in/*.jsonl.gz" \\
        output_path=out num_workers=2

`prompts` are the branches of one sample and share `main`. `data_path` is parallel JSONL or Parquet (each line
is a sample, continued after its prompts) or .txt (each line is one prompt). JSONL and .txt files may be
compressed as .gz or .zst. Samples are decoded in batches.

A single prompt prints plain text on stdout. Everything else gives JSONL with the keys "line", "main",
"branches", "reduce", "outputs" and "finish_reasons", in the order of the input lines, on stdout or in
`output_path`. "line" counts from 1 across all files. With a reduce, of the line or of the command, the last
output belongs to the reduce branch. A branch without targets, such as a document, is only read: its output is
empty. All messages go to stderr. A line that cannot be continued is reported and skipped.

Repeating the command resumes an interrupted output and leaves a finished one unchanged. An output that was
started with other settings or data is refused; OUTPUT.run.json records them. With `num_workers` the input is
split into shards independently of the number of workers, and `output_path` is a folder of part-00000.jsonl,
part-00001.jsonl and so on. Each part file appears only when it is complete.
"""

from __future__ import annotations

from parallelmind import cli
from parallelmind.outputs import check_output
from workloads.common.devices import Gpus
from workloads.generate.config import GenerateConfig


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        cli.print_help(__doc__ or "", GenerateConfig)
        return
    config = cli.parse(GenerateConfig, argv)
    config.sampling.to_kwargs()  # reject a value out of range before anything is loaded
    config.model.check()
    if config.run.output_path is not None:
        check_output(config.run.output_path, "output_path", **config.model.paths())
    # Imported late: torch and Ray take seconds to import, and --help needs neither.
    if config.input.data_path is None:
        from workloads.generate.prompts import generate_from_prompts

        generate_from_prompts(config)
    elif config.run.num_workers:
        from workloads.generate.distributed import generate_on_cluster

        gpus = Gpus.of_cluster(config.run.ray_address)
        generate_on_cluster(_decided(config, gpus, config.run.num_workers))
    else:
        from workloads.generate.local import generate_in_process

        generate_in_process(_decided(config, Gpus.of_this_machine()))


def _decided(config: GenerateConfig, gpus: Gpus, processes: int = 1) -> GenerateConfig:
    return config.model_copy(update={"model": config.model.decided(gpus, processes)})
