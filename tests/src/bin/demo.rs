//! `demo`: runs the product's main job in the lab and shows it; with `--faults` it is the end-to-end test.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use hci_tests::demo::run::{Faults, Options, run};
use hci_tests::demo::timeline::Timeline;
use hci_tests::guest;
use installer::lab::Lab;

/// What becomes of the lab at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Afterwards {
    End,
    Keep,
}

fn main() -> ExitCode {
    let outcome = arguments().and_then(|(options, afterwards)| demo(&options, afterwards));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Result<(Options, Afterwards)> {
    let (mut iso, mut lab, mut faults, mut afterwards) = (None, None, Faults::PowerOfOne, Afterwards::End);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().map(PathBuf::from).with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--iso" => iso = Some(value()?),
            "--lab" => lab = Some(value()?),
            "--faults" => faults = Faults::All,
            "--keep" => afterwards = Afterwards::Keep,
            _ => bail!("unknown argument {word}; usage: demo --iso FILE --lab FOLDER [--faults] [--keep]"),
        }
    }
    let lab = lab.context("--lab FOLDER is missing")?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
    let guest =
        guest::build(&sources, &lab.with_file_name("guest")).context("cannot build the VMs' image")?;
    Ok((Options { iso: iso.context("--iso FILE is missing")?, lab, guest, faults }, afterwards))
}

fn demo(options: &Options, afterwards: Afterwards) -> Result<()> {
    std::fs::create_dir_all(&options.lab)
        .with_context(|| format!("cannot create {}", options.lab.display()))?;
    let mut timeline = Timeline::new();
    let outcome = run(options, &mut timeline);
    timeline.write(&options.lab.join("demo.json"))?;
    println!("\n{}\n", timeline.table());
    let lab = match outcome {
        Ok(lab) => lab,
        Err(error) => {
            if afterwards == Afterwards::End {
                Lab::down(&options.lab)?;
            }
            return Err(error);
        }
    };
    print!("{}", lab.node(0).ssh("hci status; hci vm list", std::time::Duration::from_secs(60))?.stdout);
    match afterwards {
        Afterwards::Keep => {
            println!("\nThe lab is up. Next:");
            println!("  {}", lab.node(0).ssh_command_line());
            println!("  then: hci status, hci vm console web1, hci volume list");
            println!("  make lab-down ends it");
        }
        Afterwards::End => {
            Lab::down(&options.lab)?;
            println!(
                "\nNext: make demo KEEP=1 leaves the servers running; docs/guide.md does the same on three real ones."
            );
        }
    }
    Ok(())
}
