//! `unattended`: the lab's test of the install that needs nobody. Usage: `unattended --iso FILE --lab FOLDER`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use hci_tests::demo::timeline::Timeline;
use hci_tests::unattended::{Options, run};

fn main() -> ExitCode {
    match unattended() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn unattended() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [iso_flag, iso, lab_flag, lab] = &words[..] else {
        bail!("usage: unattended --iso FILE --lab FOLDER")
    };
    if (iso_flag.as_str(), lab_flag.as_str()) != ("--iso", "--lab") {
        bail!("usage: unattended --iso FILE --lab FOLDER");
    }
    let mut timeline = Timeline::new();
    let outcome = run(&Options { iso: iso.into(), lab: lab.into() }, &mut timeline);
    println!("\n{}\n", timeline.table());
    outcome
}
