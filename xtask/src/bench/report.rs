//! The table that a benchmark run leaves.

use crate::bench::measure::Samples;

/// One line of work with all that did it.
#[derive(Debug)]
pub struct Row {
    /// What was done.
    pub work: String,
    /// `ms`, `KiB`, `MB`.
    pub unit: &'static str,
    /// Coracle first.
    pub samples: Vec<Samples>,
    /// What Coracle must reach: at most this share of a peer whose name begins so, or an absolute figure.
    pub goals: Vec<Goal>,
}

/// What Coracle must reach in a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Goal {
    /// At most `share` of this peer's median.
    Of {
        /// Beginning of the peer's name.
        peer: &'static str,
        /// Coracle's median divided by the peer's.
        share: f64,
    },
    /// At most this, in the row's unit.
    AtMost(f64),
}

impl Row {
    fn median(&self, name: &str) -> Option<f64> {
        self.samples.iter().find(|s| s.name.starts_with(name)).and_then(Samples::median)
    }

    /// Each goal in words, and whether it is reached.
    fn verdicts(&self) -> Vec<(String, Option<bool>)> {
        let own = self.median("coracle");
        self.goals
            .iter()
            .map(|goal| match goal {
                Goal::AtMost(most) => (format!("≤ {} {}", number(*most), self.unit), own.map(|o| o <= *most)),
                Goal::Of { peer, share } => {
                    let both = own.zip(self.median(peer));
                    let reached =
                        both.map(|(own, peer)| format!(", is {:.3}", own / peer)).unwrap_or_default();
                    (format!("≤ {share:.3} × {peer}{reached}"), both.map(|(own, peer)| own <= share * peer))
                }
            })
            .collect()
    }

    /// The row as lines of the table, one per candidate.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for (n, samples) in self.samples.iter().enumerate() {
            let cell = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), number);
            let ratio = match (self.median("coracle"), samples.median()) {
                (Some(own), Some(other)) if !samples.name.starts_with("coracle") && own > 0.0 => {
                    format!("{:.1} ×", other / own)
                }
                _ => String::new(),
            };
            let goals = if n == 0 { self.goal_cell() } else { String::new() };
            let work = if n == 0 { format!("{} ({})", self.work, self.unit) } else { String::new() };
            let median =
                samples.failed.as_ref().map_or_else(|| cell(samples.median()), |_| "failed".to_owned());
            text.push_str(&format!(
                "| {work} | {} | {median} | {} | {} | {ratio} | {goals} |\n",
                samples.name,
                cell(samples.percentile(10)),
                cell(samples.percentile(90)),
            ));
        }
        text
    }

    fn goal_cell(&self) -> String {
        let verdicts = self.verdicts().into_iter().map(|(text, reached)| match reached {
            Some(true) => format!("{text}: reached"),
            Some(false) => format!("{text}: **missed**"),
            None => format!("{text}: not measured"),
        });
        verdicts.collect::<Vec<_>>().join("; ")
    }
}

/// Three significant digits.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The whole document.
#[must_use]
pub fn document(machine: &str, notes: &[String], rows: &[Row]) -> String {
    let mut text = format!(
        "# Benchmarks\n\nWritten by `./dev bench`. {machine}\n\n\
         Candidates took turns within each round of one run; warm-up rounds do not count. \"ratio\" is the \
         candidate's median divided by Coracle's.\n\n"
    );
    for note in notes {
        text.push_str(&format!("- {note}\n"));
    }
    text.push_str("\n| work | by | median | p10 | p90 | ratio | goal |\n|---|---|--:|--:|--:|--:|---|\n");
    for row in rows {
        text.push_str(&row.markdown());
    }
    text
}

/// Between these lines of the README lies the short table.
const SUMMARY: (&str, &str) = ("<!-- bench -->\n", "<!-- /bench -->");

/// The README with its table made anew: one line per row that has other engines in it.
#[must_use]
pub fn with_summary(readme: &str, machine: &str, rows: &[Row]) -> Option<String> {
    let (before, rest) = readme.split_once(SUMMARY.0)?;
    let (_, after) = rest.split_once(SUMMARY.1)?;
    let engines: Vec<&str> = ENGINES
        .iter()
        .filter_map(|e| {
            rows.iter().flat_map(|r| &r.samples).map(|s| s.name.as_str()).find(|n| n.starts_with(e))
        })
        .collect();
    let mut table = format!("| | {} |\n|---|{}\n", engines.join(" | "), "--:|".repeat(engines.len()));
    for row in rows.iter().filter(|r| r.samples.iter().filter(|s| is_engine(&s.name)).count() > 1) {
        let cells: Vec<String> = engines
            .iter()
            .map(|e| row.median(e).map_or_else(|| "–".to_owned(), |m| format!("{} {}", number(m), row.unit)))
            .collect();
        table.push_str(&format!("| {} | {} |\n", row.work, cells.join(" | ")));
    }
    Some(format!("{before}{}{table}\n{machine}\n{}{after}", SUMMARY.0, SUMMARY.1))
}

const ENGINES: [&str; 3] = ["coracle ", "docker", "podman"];

fn is_engine(name: &str) -> bool {
    ENGINES.iter().any(|e| name.starts_with(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(own: f64, peer: f64) -> Row {
        Row {
            work: "exec".to_owned(),
            unit: "ms",
            samples: vec![Samples::new("coracle 0.1.0", vec![own]), Samples::new("docker 20", vec![peer])],
            goals: vec![Goal::Of { peer: "docker", share: 0.1 }, Goal::AtMost(2.0)],
        }
    }

    #[test]
    fn a_goal_is_reached_at_its_limit_and_missed_beyond() {
        assert!(
            row(2.0, 20.0).markdown().contains("≤ 0.100 × docker, is 0.100: reached; ≤ 2.00 ms: reached")
        );
        assert!(row(2.1, 20.0).markdown().contains("is 0.105: **missed**; ≤ 2.00 ms: **missed**"));
    }

    #[test]
    fn the_summary_replaces_the_last_one() {
        let readme = "a\n<!-- bench -->\nold\n<!-- /bench -->\nb";
        let new = with_summary(readme, "machine", &[row(2.0, 20.0)]).unwrap();
        let table = "| | coracle 0.1.0 | docker 20 |\n|---|--:|--:|\n| exec | 2.00 ms | 20.0 ms |\n";
        assert_eq!(new, format!("a\n<!-- bench -->\n{table}\nmachine\n<!-- /bench -->\nb"));
        assert_eq!(with_summary(&new, "machine", &[row(2.0, 20.0)]), Some(new));
        assert_eq!(with_summary("no marks", "", &[]), None);
    }

    #[test]
    fn a_peer_has_its_ratio_and_a_failed_one_says_so() {
        let mut row = row(2.0, 20.0);
        assert!(row.markdown().ends_with("|  | docker 20 | 20.0 | 20.0 | 20.0 | 10.0 × |  |\n"));
        row.samples[1] = Samples::new("docker 20", vec![]);
        row.samples[1].failed = Some("why".to_owned());
        assert!(row.markdown().contains("| docker 20 | failed |"), "{}", row.markdown());
        assert!(row.markdown().contains("≤ 0.100 × docker: not measured"));
    }
}
