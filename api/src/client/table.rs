//! Text in columns, as wide as their contents.

use std::fmt::Write;

use anstyle::Style;

use crate::text::escaped;

/// Between two columns.
const GAP: &str = "  ";

/// On which side of its column a text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// What stands in a place of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    /// `text` in `style`.
    pub fn styled(text: impl AsRef<str>, style: Style) -> Self {
        Self {
            text: escaped(text.as_ref()).into_owned(),
            style,
        }
    }
}

impl<T: ToString> From<T> for Cell {
    fn from(value: T) -> Self {
        Self::styled(value.to_string(), Style::new())
    }
}

/// Rows under a heading.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<(&'static str, Side)>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table of these columns, without rows.
    pub fn new(columns: &[(&'static str, Side)]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; a cell for each column.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The heading and the rows, with styles as escape sequences.
    pub fn render(&self) -> String {
        let heading = self
            .columns
            .iter()
            .map(|(name, _)| Cell::styled(*name, Style::new().bold()));
        let rows: Vec<Vec<Cell>> = std::iter::once(heading.collect())
            .chain(self.rows.iter().cloned())
            .collect();
        let width = |column: usize| {
            let texts = rows.iter().filter_map(|row| row.get(column));
            texts.map(|cell| cell.text.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        rows.iter().map(|row| self.render_row(row, &widths)).collect()
    }

    fn render_row(&self, row: &[Cell], widths: &[usize]) -> String {
        let mut line = String::new();
        for (index, ((cell, (_, side)), width)) in row.iter().zip(&self.columns).zip(widths).enumerate() {
            if index > 0 {
                line.push_str(GAP);
            }
            let padding = " ".repeat(width - cell.text.chars().count());
            let (style, text) = (cell.style, &cell.text);
            // Writing to a String does not fail.
            let _ = match side {
                Side::Left => write!(line, "{style}{text}{style:#}{padding}"),
                Side::Right => write!(line, "{padding}{style}{text}{style:#}"),
            };
        }
        line.truncate(line.trim_end_matches(' ').len());
        line.push('\n');
        line
    }
}

#[cfg(test)]
mod tests {
    use anstyle::AnsiColor;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let mut table = Table::new(&[("NAME", Side::Left), ("CPUS", Side::Right), ("STATE", Side::Left)]);
        table.row(["w".into(), 12345.into(), "ä".into()]);
        table.row([
            "database".into(),
            2.into(),
            Cell::styled("on", AnsiColor::Green.on_default()),
        ]);
        assert_eq!(
            table.render(),
            "\x1b[1mNAME\x1b[0m       \x1b[1mCPUS\x1b[0m  \x1b[1mSTATE\x1b[0m\n\
             w         12345  ä\n\
             database      2  \x1b[32mon\x1b[0m\n"
        );
    }
}
