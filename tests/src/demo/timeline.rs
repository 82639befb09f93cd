//! The live timeline of a run, its table of steps, and the file that machines read.
//!
//! A step is a name, an outcome and a time. Waiting inside a step always has a limit; what it waits for is shown while
//! it waits and named when the limit is reached.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

/// One step of a run, as `demo.json` has it.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// What was done.
    pub name: String,
    /// Whether it worked.
    pub ok: bool,
    /// How long it took.
    pub seconds: f64,
}

/// Prints steps as they happen and remembers them.
#[derive(Debug)]
pub struct Timeline {
    started: Instant,
    steps: Vec<Step>,
}

impl Timeline {
    /// A timeline that starts now.
    #[expect(clippy::new_without_default, reason = "a timeline that starts now is no default value")]
    pub fn new() -> Self {
        Self { started: Instant::now(), steps: Vec::new() }
    }

    /// Runs one step; its failure ends the run.
    pub fn step<T>(&mut self, name: &str, work: impl FnOnce(&mut Progress) -> Result<T>) -> Result<T> {
        let mut progress = Progress { run: self.started, step: Instant::now() };
        progress.print(&format!("▶ {name}"));
        let outcome = work(&mut progress);
        let seconds = progress.step.elapsed().as_secs_f64();
        self.steps.push(Step { name: name.to_owned(), ok: outcome.is_ok(), seconds });
        match &outcome {
            Ok(_) => progress.print(&format!("✓ {name} ({seconds:.1} s)")),
            Err(error) => progress.print(&format!("✗ {name}: {error:#}")),
        }
        outcome.with_context(|| format!("step failed: {name}"))
    }

    /// The steps so far.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The table of all steps with their times.
    pub fn table(&self) -> String {
        let width = self.steps.iter().map(|step| step.name.chars().count()).max().unwrap_or(0);
        let mut lines: Vec<_> = self
            .steps
            .iter()
            .map(|step| {
                let mark = if step.ok { "✓" } else { "✗" };
                let fill = " ".repeat(width - step.name.chars().count());
                format!("  {mark} {}{fill}  {:>7.1} s", step.name, step.seconds)
            })
            .collect();
        lines.push(format!(
            "    total{}  {:>7.1} s",
            " ".repeat(width.saturating_sub(5)),
            self.started.elapsed().as_secs_f64()
        ));
        lines.join("\n")
    }

    /// Writes the steps as JSON.
    pub fn write(&self, file: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(&self.steps)?;
        std::fs::write(file, json + "\n").with_context(|| format!("cannot write {}", file.display()))
    }
}

/// Says what happens inside a step.
#[derive(Debug)]
pub struct Progress {
    run: Instant,
    step: Instant,
}

/// How often a wait looks again, and how often it says that it still waits.
const LOOK: Duration = Duration::from_millis(500);
const SAY: Duration = Duration::from_secs(10);

impl Progress {
    /// Prints one line with the time since the run began.
    pub fn print(&self, text: &str) {
        let seconds = self.run.elapsed().as_secs();
        // Losing the terminal must not lose the run.
        let _ = writeln!(std::io::stdout().lock(), "[{:>3}:{:02}] {text}", seconds / 60, seconds % 60);
    }

    /// Prints a detail of the step.
    pub fn note(&self, text: &str) {
        self.print(&format!("    {text}"));
    }

    /// Looks again and again until there is an answer; `look` says in words what it saw while there is none.
    pub fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut() -> Result<Look<T>>,
    ) -> Result<T> {
        let started = Instant::now();
        let mut said = Instant::now();
        loop {
            let seen = match look() {
                Ok(Look::Done(value)) => return Ok(value),
                Ok(Look::NotYet(seen)) => seen,
                Err(error) if started.elapsed() > limit => {
                    return Err(error.context(format!("waited for {what}")));
                }
                Err(error) => format!("{error:#}"),
            };
            if started.elapsed() > limit {
                bail!("waited {} s for {what}; the last state seen: {seen}", limit.as_secs());
            }
            if said.elapsed() > SAY {
                said = Instant::now();
                let mut seen = seen.replace('\n', " ");
                if let Some((cut, _)) = seen.char_indices().nth(160) {
                    seen.truncate(cut);
                }
                self.note(&format!(
                    "waiting for {what} ({} s of {}): {seen}",
                    started.elapsed().as_secs(),
                    limit.as_secs()
                ));
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// What a look at something under way saw.
#[derive(Debug)]
pub enum Look<T> {
    /// It is there.
    Done(T),
    /// It is not there yet; this is what there is.
    NotYet(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_is_kept_with_the_others() {
        let mut timeline = Timeline::new();
        timeline.step("one", |_| Ok(())).unwrap();
        timeline.step("two", |_| -> Result<()> { bail!("broken") }).unwrap_err();
        let outcome: Vec<_> = timeline.steps().iter().map(|step| step.ok).collect();
        assert_eq!(outcome, [true, false]);
        assert!(timeline.table().contains("✗ two"));
    }

    #[test]
    fn a_wait_ends_at_its_limit_and_says_what_it_saw() {
        let progress = Progress { run: Instant::now(), step: Instant::now() };
        let waited: Result<()> = progress.wait("rain", Duration::ZERO, || Ok(Look::NotYet("sun".to_owned())));
        let message = waited.unwrap_err().to_string();
        assert!(message.contains("rain") && message.contains("sun"), "{message}");
    }
}
